"""Compiles the contract into the package.

Run it with `make protos`; `make protos-check` fails when the committed stubs
differ from what it writes. Two things go beyond a plain protoc call:

- The client must need grpcio, protobuf and numpy only, but `google.rpc.Status`
  comes from googleapis-common-protos. So a copy of Google's two files is
  compiled too, and the contract's stub imports `stepstate.v1.google_rpc`, which
  takes the installed package where there is one: two copies of one proto in a
  process would collide.
- `--pyi_out` writes the types beside the stubs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from grpc_tools import protoc

ROOT = Path(__file__).parent
CONTRACT = "stepstate/v1/stepstate.proto"
GOOGLE = ("google/rpc/status.proto", "google/rpc/error_details.proto")
GOOGLE_IMPORT = "from google.rpc import status_pb2 as "
OWN_IMPORT = "from stepstate.v1.google_rpc import status_pb2 as "
BUILT_IN = Path(protoc.__file__).parent / "_proto"


def generate(package: Path) -> None:
    """Writes the stubs below a folder that holds the package `stepstate`."""
    with TemporaryDirectory() as scratch:
        outputs = [f"--{kind}_out={scratch}" for kind in ("python", "pyi", "grpc_python")]
        command = ["protoc", f"-I{ROOT}", f"-I{BUILT_IN}", *outputs, CONTRACT, *GOOGLE]
        if protoc.main(command) != 0:
            sys.exit("protoc refused the contract")
        target = package / "stepstate" / "v1"
        (target / "vendored").mkdir(parents=True, exist_ok=True)
        for made in Path(scratch, "stepstate", "v1").iterdir():
            text = made.read_text().replace(GOOGLE_IMPORT, OWN_IMPORT)
            (target / made.name).write_text(text)
        for made in Path(scratch, "google", "rpc").glob("*_pb2.py*"):
            (target / "vendored" / made.name).write_text(made.read_text())


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "service")
