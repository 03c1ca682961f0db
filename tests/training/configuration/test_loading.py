from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import Field, ValidationError
from torch import nn

from holdfast.training.configuration.loading import (
    config_digest,
    config_from_record,
    digested_values,
    experiment_settings,
    nearest,
    resolve_config,
)
from holdfast.training.configuration.schema import UNLESS_DEFAULT, RunConfig, Section
from holdfast.training.errors import ConfigError
from holdfast.training.experiment.loading import default_values, load_experiment, settings_class
from holdfast.training.experiment.protocol import NoSettings
from holdfast.training.experiments import EXPERIMENTS
from holdfast.training.optimizers.building import build_optimizer
from holdfast.training.optimizers.schedule import build_scheduler

REPOSITORY = Path(__file__).parents[3]


class Settings(Section):
    width: int = Field(4, ge=1)
    rate: float = 0.5
    pauses: tuple[int, ...] = ()
    folder: Path | None = None


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


def test_who_chooses_by_another_metric_says_which_direction_is_good() -> None:
    with pytest.raises(ConfigError, match=r"'accuracy': is more of it better, or less\? Say so"):
        resolve("selection.metric=accuracy")
    config = resolve("selection.metric=accuracy", "selection.mode=max")
    assert (config.selection.metric, config.selection.mode) == ("accuracy", "max")
    preferred = {"selection": {"metric": "rmse", "mode": "min"}}
    with pytest.raises(ConfigError, match=r"selection\.mode=max or selection\.mode=min"):
        resolve_config(
            settings_class=Settings, defaults=preferred, overrides=["selection.metric=accuracy"]
        )
    again = resolve_config(
        settings_class=Settings, defaults=preferred, overrides=["selection.metric=rmse"]
    )
    assert again.selection.mode == "min"


def test_nobody_chooses_the_largest_loss() -> None:
    with pytest.raises(ConfigError, match=r"would choose the largest loss.*selection\.mode=min"):
        resolve("selection.mode=max")
    assert resolve("selection.metric=bleu", "selection.mode=max").selection.mode == "max"


def test_the_best_k_and_early_stopping_may_follow_metrics_of_their_own() -> None:
    config = resolve()
    assert config.selection.top_k_ranking == config.early_stopping_ranking == ("loss", "min")
    bleu = ("selection.metric=bleu", "selection.mode=max")
    config = resolve(*bleu)
    assert config.selection.top_k_ranking == config.early_stopping_ranking == ("bleu", "max")
    config = resolve(*bleu, "selection.top_k_metric=loss", "early_stopping.metric=bleu")
    assert config.selection.top_k_ranking == ("loss", "min")
    assert config.early_stopping_ranking == ("bleu", "max")
    config = resolve("early_stopping.metric=accuracy", "early_stopping.mode=max")
    assert config.selection.top_k_ranking == ("loss", "min")
    assert config.early_stopping_ranking == ("accuracy", "max")


@pytest.mark.parametrize("prefix", ["selection.top_k_", "early_stopping."])
def test_a_metric_of_its_own_says_which_direction_is_good(prefix: str) -> None:
    with pytest.raises(ConfigError, match=rf"{prefix}metric = 'bleu': is more of it better, or"):
        resolve(f"{prefix}metric=bleu")
    with pytest.raises(ConfigError, match=rf"{prefix}mode = 'max' belongs to {prefix}metric"):
        resolve(f"{prefix}mode=max")
    with pytest.raises(ConfigError, match=rf"{prefix}mode = 'max' would prefer the largest loss"):
        resolve(f"{prefix}metric=loss", f"{prefix}mode=max")


def test_light_checkpoints_that_would_all_be_full_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"weights_every_epochs=4 saves nothing that .*_epochs=2"):
        resolve("checkpoint.every_epochs=2", "checkpoint.weights_every_epochs=4")
    light = ("checkpoint.every_epochs=4", "checkpoint.weights_every_epochs=1")
    snapshots = ("ema.posthoc_gammas=[16.97]", "ema.posthoc_snapshot_epochs=3")
    assert resolve(*light, *snapshots).ema.posthoc_snapshot_epochs == 3


@pytest.mark.parametrize(
    "override",
    [
        "train.steps_per_epoch=7",
        "checkpoint.weights_every_steps=7",
        "selection.top_k_metric=loss",
        "early_stopping.metric=loss",
    ],
)
def test_new_keys_are_part_of_the_digest_only_where_they_are_set(override: str) -> None:
    key = override.partition("=")[0]
    assert config_digest(resolve(override)) != config_digest(resolve())
    section, _, name = key.partition(".")
    assert name not in digested_values(resolve())[section]


def test_an_experiments_new_key_is_part_of_the_configuration_only_where_it_is_set() -> None:
    class Grown(Settings):
        files: tuple[str, ...] = Field((), json_schema_extra=UNLESS_DEFAULT)

    def grown(*overrides: str) -> RunConfig:
        return resolve_config(settings_class=Grown, overrides=overrides)

    assert grown("experiment.files=[]") == resolve()
    assert config_digest(grown()) == config_digest(resolve())
    assert experiment_settings(Grown, resolve()).files == ()
    named = grown('experiment.files=["a"]')
    assert named.experiment["files"] == ["a"]
    assert config_digest(named) != config_digest(resolve())


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
        ("train.num_epochs='3'", ["= '3': expected an integer", "found text", "num_epochs=3"]),
        ("train.num_epochs=3.0", ["= 3.0: expected an integer", "write train.num_epochs=3"]),
        ("train.num_epochs=true", ["= true: expected an integer, found a boolean"]),
        ("train.num_epochs.x=3", ["= {'x': 3}: expected an integer, found a table"]),
        ("train.clip_norm='1.5'", ["expected a number, found text; write train.clip_norm=1.5"]),
        ("train.clip_norm=inf", ["train.clip_norm = inf", "finite"]),
        ("data.should_drop_last=yes", ["'yes'", "write data.should_drop_last=true or"]),
        ("logging.tensorboard=1", ["= 1: expected true or false, found an integer"]),
        ("data.folder=3", ["= 3: expected text", """--set 'data.folder="3"'"""]),
        ("seed=2024-01-01", ["seed = 2024-01-01: expected an integer, found a date or time"]),
        ("experiment.width=2.0", ["experiment.width = 2.0: expected an integer"]),
        ("experiment.pauses=3", ["experiment.pauses=[3]"]),
        ("ema.decays=0.9", ["a list, found a number", "--set 'ema.decays=[0.9]'"]),
        ("ema.decays=0.9,0.99", ["write ema.decays=[0.9, 0.99]"]),
        ("ema.decays=['a']", ["ema.decays[0] = 'a': expected a number, found text"]),
        ("ema.decays=[1.0]", ["ema.decays = [1.0]"]),
        ("ema.posthoc_widths=[0.1, 0.1]", ["ema.posthoc_widths = [0.1, 0.1]", "differ"]),
        ("preemption.sources=signal", ["""--set 'preemption.sources=["signal"]'"""]),
        ("preemption.sources=[signal]", ["""write preemption.sources=["signal"]"""]),
        ("preemption.sources=['signl']", ["preemption.sources[0] = 'signl'", "'slurm'"]),
        ("train=3", ["train = 3: expected a table", "write train.KEY=VALUE", "num_epochs"]),
        ("checkpoint.keep_above=0.9", ["checkpoint.keep_above = 0.9: expected a table"]),
        ("data.folder=\udcff", ["UTF-8"]),
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


def test_a_value_in_place_of_a_table_does_not_hide_the_defaults_below_it(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    for text, key in [("train = 3", "train"), ("[optimizer]\nargs = 3", "optimizer.args")]:
        file.write_text(text)
        with pytest.raises(ConfigError, match=rf"^{key} = 3: expected a table, found an integer"):
            resolve_config(
                settings_class=Settings,
                defaults={"train": {"num_epochs": 7}},
                file=file,
                overrides=[f"{key}.num_threads=2"],
            )


def test_lists_paths_and_integers_stand_for_tuples_paths_and_floats(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'data.folder = "/d"\ntrain.clip_norm = 1\nema.decays = [0, 0.5]\n'
        'experiment = {rate = 2, pauses = [3, 4], folder = "/f"}\n'
    )
    config = resolve(file=file)
    assert (config.data.folder, config.train.clip_norm) == (Path("/d"), 1.0)
    assert config.ema.decays == (0.0, 0.5)
    settings = experiment_settings(Settings, config)
    assert settings == Settings(rate=2.0, pauses=(3, 4), folder=Path("/f"))


def test_settings_of_experiments_are_strict() -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate({"width": "4"})


@pytest.mark.parametrize("name", ["Adamw", "adamw", "ADAMW"])
def test_the_nearest_name_does_not_depend_on_case(name: str) -> None:
    assert nearest(name, ["Adam", "AdamW", "SGD"]).startswith("did you mean 'AdamW'?")


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
    config = resolve(
        "data.folder=/x",
        "ema.decays=[0.5, 0.1]",
        "train.clip_norm=1",
        "optimizer.args={lr = 0.1234567890123456789, betas = [0.9, 1e-300]}",
        "experiment.pauses=[1, 2]",
        "experiment.folder=/x",
    )
    again = config_from_record(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config
    assert experiment_settings(Settings, again) == experiment_settings(Settings, config)
    assert config_digest(again) == config_digest(config)


PUBLISHED = [*REPOSITORY.glob("benchmarks/configurations/*.toml"), *REPOSITORY.glob("docs/*.toml")]


@pytest.mark.parametrize("path", PUBLISHED or ["there are none"])
def test_the_configurations_that_are_published_are_valid(path: Path) -> None:
    names = [name for name in EXPERIMENTS if path.stem.startswith(name)]
    experiment = load_experiment(max(names, key=len))
    settings = settings_class(experiment)
    config = resolve_config(
        settings_class=settings, defaults=default_values(experiment), file=path, overrides=()
    )
    experiment_settings(settings, config)
    optimizer = build_optimizer(config.optimizer, nn.Linear(2, 2))
    build_scheduler(config.scheduler, optimizer)
