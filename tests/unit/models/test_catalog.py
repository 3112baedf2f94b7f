from __future__ import annotations

import shutil

import pytest

from stepstate.errors import InvalidField, ModelInvalid, ModelUnknown
from stepstate.models import Catalog, ModelAccess, load_catalog
from tests.networks import make_network
from tests.unit.rig import model_of


def versions(name: str, *numbers: str):
    for number in numbers:
        network = make_network(name)
        network.manifest["version"] = number
        yield model_of(network)


@pytest.fixture
def catalog() -> Catalog:
    return Catalog([*versions("b", "2", "10", "9"), *versions("a", "1")])


def test_models_come_by_name_then_by_version_as_a_number(catalog):
    assert [model.key for model in catalog] == ["a/1", "b/2", "b/9", "b/10"]


def test_without_a_version_the_newest_is_found(catalog):
    assert catalog.find("b").key == "b/10"
    assert catalog.find("b", "9").key == "b/9"


def test_without_a_name_the_only_model_is_found(catalog):
    assert Catalog(versions("b", "1", "2")).find("").key == "b/2"
    with pytest.raises(InvalidField, match="a, b"):
        catalog.find("")


@pytest.mark.parametrize(("name", "version"), [("c", ""), ("b", "3"), ("a", "2")])
def test_what_is_not_loaded_is_refused_with_what_is(catalog, name, version):
    with pytest.raises(ModelUnknown) as error:
        catalog.find(name, version)
    assert f"'{name}/{version}'" in str(error.value) or not version
    assert "a/1, b/2, b/9, b/10" in str(error.value)


def test_the_error_names_the_model_that_was_meant_without_a_name():
    with pytest.raises(ModelUnknown, match="'b/7'"):
        Catalog(versions("b", "1")).find("", "7")


def test_every_version_under_a_folder_is_loaded(model_root, networks):
    catalog = load_catalog(model_root)
    assert {model.manifest.name for model in catalog} == set(networks)


def test_one_bad_model_refuses_them_all(model_root, tmp_path):
    root = tmp_path / "models"
    shutil.copytree(model_root, root)
    (root / "gru" / "1" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelInvalid, match="gru"):
        load_catalog(root)


def test_a_folder_without_models_is_refused(tmp_path):
    with pytest.raises(ModelInvalid, match=r"holds no <name>/<version>/manifest.json"):
        load_catalog(tmp_path)
    with pytest.raises(ModelInvalid, match="is not a folder"):
        load_catalog(tmp_path / "none")


def test_for_a_tenant_there_are_only_the_models_that_it_may_use(model_root, networks):
    access = ModelAccess({"gru": frozenset({"acme"}), "lstm": frozenset()})
    catalog = load_catalog(model_root, access=access)
    others = networks.keys() - {"gru", "lstm"}
    assert {model.manifest.name for model in catalog.of("acme")} == others | {"gru"}
    assert {model.manifest.name for model in catalog.of("initech")} == others
    with pytest.raises(ModelUnknown) as refused:
        catalog.of("initech").find("gru")
    assert "gru/1" not in refused.value.loaded


def test_where_no_model_is_limited_all_tenants_have_the_same(model_root):
    catalog = load_catalog(model_root)
    assert catalog.of("acme") is catalog


def test_a_limit_of_a_model_that_is_not_there_is_refused(model_root):
    """A misspelt name would leave the model open to all."""
    with pytest.raises(ModelInvalid, match="lstn"):
        load_catalog(model_root, access=ModelAccess({"lstn": frozenset({"acme"})}))
