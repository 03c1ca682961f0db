from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from training.config import RunConfig, Section
from training.config_loading import config_digest, config_from_record, resolve_config
from training.errors import ConfigError
from training.experiment import NoSettings


class Settings(Section):
    width: int = Field(4, ge=1)


def resolve(*overrides: str, file: Path | None = None) -> RunConfig:
    return resolve_config(settings_class=Settings, file=file, overrides=overrides)


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("seed = 3\n[train]\nnum_epochs = 7\nclip_norm = 2.0\n")
    config = resolve_config(
        settings_class=Settings,
        defaults={"train": {"num_epochs": 5, "num_microbatches": 2}},
        file=file,
        overrides=["train.clip_norm=1.5"],
    )
    assert (config.seed, config.train.num_epochs) == (3, 7)
    assert (config.train.clip_norm, config.train.num_microbatches) == (1.5, 2)


def test_values_of_overrides_are_toml_or_text() -> None:
    config = resolve("ema.decays=[0.9, 0.99]", "optimizer.args.lr=1e-2", "data.folder=/some/where")
    assert config.ema.decays == (0.9, 0.99)
    assert config.optimizer.args["lr"] == 0.01
    assert config.data.folder == Path("/some/where")


def test_another_optimizer_drops_the_arguments_of_the_first() -> None:
    config = resolve_config(
        settings_class=NoSettings,
        defaults={"optimizer": {"name": "AdamW", "args": {"lr": 1e-3, "betas": [0.9, 0.99]}}},
        overrides=["optimizer.name=SGD", "optimizer.args.lr=0.1"],
    )
    assert config.optimizer.args == {"lr": 0.1}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.num_epoch=3", ["train.num_epoch", "did you mean 'num_epochs'?"]),
        ("trian.num_epochs=3", ["trian", "did you mean 'train'?"]),
        ("train.num_epochs=0", ["train.num_epochs = 0", "greater than or equal to 1"]),
        ("train.num_epochs=many", ["train.num_epochs = 'many'", "integer"]),
        ("train.precision=fp8", ["train.precision = 'fp8'", "'bf16'"]),
        ("ema.decays=[1.0]", ["[0, 1)", "1.0"]),
        ("experiment.width=0", ["experiment.width = 0", "greater than or equal to 1"]),
        ("experiment.widht=1", ["experiment.widht", "did you mean 'width'?"]),
        ("train.num_microbatches=100", ["train.num_microbatches=100", "data.batch_size=64"]),
        ("num_epochs", ["'num_epochs'", "section.key=value"]),
    ],
)
def test_bad_input_is_one_line_that_names_key_value_and_what_is_allowed(
    override: str, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(override)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    assert caught.value.exit_code == 2


def test_a_missing_or_malformed_file_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    with pytest.raises(ConfigError, match=r"none\.toml does not exist"):
        resolve(file=missing)
    malformed = tmp_path / "bad.toml"
    malformed.write_text("[train\n")
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML"):
        resolve(file=malformed)


@pytest.mark.parametrize(
    "override",
    [
        "data.folder=/elsewhere",
        "data.num_workers=4",
        "logging.level=debug",
        "checkpoint.keep_last=9",
    ],
)
def test_digest_leaves_out_what_does_not_change_the_result(override: str) -> None:
    assert config_digest(resolve(override)) == config_digest(resolve())


@pytest.mark.parametrize(
    "override", ["seed=1", "data.batch_size=32", "optimizer.args.lr=0.5", "experiment.width=5"]
)
def test_digest_covers_what_changes_the_result(override: str) -> None:
    assert config_digest(resolve(override)) != config_digest(resolve())


def test_a_recorded_configuration_comes_back_with_the_same_digest() -> None:
    config = resolve("data.folder=/x", "ema.decays=[0.5]")
    again = config_from_record(config.model_dump(mode="json"))
    assert again == config
    assert config_digest(again) == config_digest(config)
