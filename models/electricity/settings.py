"""How each version of the model is trained; the values were chosen on training weeks alone."""

from __future__ import annotations

from dataclasses import dataclass

LAGS = (*range(49), *range(288, 385))
"""The last day, and of the week before what the next day of it, and the day before that, were."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a model is trained. As it stands, version 1: all that a session remembers is (h, c)."""

    hidden_size: int = 128  # 64 is a little worse, at half the cost
    updates: int = 2000  # at 500 it has not learnt to follow the last row; more gain nothing
    batch: int = 16  # windows of one update: small, for many updates in little time
    window_steps: int = 240  # five days; a week gains little and takes twice as long
    learning_rate: float = 5e-3  # falls to zero by a cosine
    gradient_norm: float = 1.0  # clips most updates early on and few at the end
    dropout: float = 0.2  # of the head's input; 0.1 is no better
    width: float = 3.5  # scale in standard deviations: what lies beyond ±1 saturates the gates
    level_range: float = 0.05  # windows are scaled by 1 ± this: levels drift
    profile_noise: float = 0.02  # relative, smooth over the day: dusk moves from week to week
    near_weight: float = 4.0  # more weight on the next half-hours: they are learnt last
    averaged_updates: int = 100  # the model is the mean of these last ones: less left to chance
    validation_weeks: int = 2  # the last of the training weeks
    validation_drop: float = 0.05  # the last training week lies so far below the others' mean

    lags: tuple[int, ...] = ()
    """Steps back of the deviations that the head takes beside h."""
    quantiles: tuple[float, ...] = (0.5,)
    quantile_weights: tuple[float, ...] = (1.0,)
    """The weight of each quantile's loss; that of the median, the forecast itself, is 1."""
    lags_learning_rate: float = 0.0
    past_left_out: float = 0.0
    cold_share: float = 0.0

    @property
    def past_steps(self) -> int:
        """Rows before a window that its lags need."""
        return max(self.lags, default=0)

    def numbers(self) -> dict[str, float]:
        """The settings that are single numbers, and not 0, by name."""
        values = ((name, getattr(self, name)) for name in self.__slots__)
        return {name: value for name, value in values if isinstance(value, int | float) and value}


LAGGED = Settings(
    hidden_size=64,  # the lags remember; 96 is about as good and slower
    updates=1000,
    learning_rate=4e-3,
    level_range=0.1,  # at 5% it trusts last week's level too much; 15% is about as good
    lags=LAGS,
    quantiles=(0.05, 0.5, 0.95),
    quantile_weights=(0.5, 1.0, 0.5),
    lags_learning_rate=1e-3,  # they begin near the right values; at 3e-3 they go astray
    past_left_out=0.2,  # windows whose profile does not know the week before either
    cold_share=0.1,  # windows that begin a session: their lags are 0
)
"""Version 2."""

SETTINGS = {"1": Settings(), "2": LAGGED}
"""By version."""
