import re
from pathlib import Path

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.config import CONFIG_FOLDERS, Config, load_config
from rft_cluster.config.load import read_file
from rft_cluster.config.model import LoraSection, ModelSection

CONFIGS = Path(__file__).parents[3] / "configs"
MINIMAL = """
run: {name: mine}
model: {path: tiny}
data: {source: digits}
schedule: {steps: 4, prompts_per_step: 2}
cluster: {device: cpu}
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A working folder without configs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(folder: Path, text: str, *overrides: str) -> Config:
    (folder / "mine.yaml").write_text(text)
    return load_config(str(folder / "mine.yaml"), list(overrides))


def refusal(folder: Path, *overrides: str, text: str = MINIMAL) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, text, *overrides)
    return str(caught.value)


# --- finding the file


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path):
    assert load_config(str(path), []).run.name == path.stem


def test_a_bare_name_is_found_from_any_folder(elsewhere):
    assert load_config("digits", []) == load_config("digits.yaml", []) == load_config(str(CONFIGS / "digits.yaml"), [])


def test_the_working_folder_comes_first(elsewhere):
    (elsewhere / "digits.yaml").write_text(MINIMAL)
    assert load_config("digits", []).run.name == "mine"
    assert CONFIG_FOLDERS[0] == Path()


@pytest.mark.parametrize("name", ["~nobody-of-that-name/c", "~", "x" * 5000, "a\0b", "/dev/null", "."])
def test_a_name_that_can_be_no_file_is_unknown(elsewhere, name):
    with pytest.raises(UserError, match="is neither a file nor one of"):
        load_config(name, [])


def test_an_unknown_config_gets_the_nearest(elsewhere):
    with pytest.raises(UserError, match=r"config 'digit' is neither a file nor one of .*Did you mean digits\?"):
        load_config("digit", [])


def test_without_a_near_one_all_are_named(elsewhere):
    with pytest.raises(UserError, match=r"config 'zzz' is neither a file nor one of .*digits") as caught:
        load_config("zzz", [])
    assert "Did you mean" not in str(caught.value)


# --- values


def test_what_is_left_out_has_its_default(tmp_path):
    config = load(tmp_path, MINIMAL)
    assert config.rewards == {"format": 1.0, "accuracy": 1.0}
    assert config.sampling.group_size == 8
    assert config.run_folder == Path("runs/mine")
    assert config.max_model_tokens == 1024 + 256


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optimizer.learning_rate=1e-4", "optimizer", "learning_rate", 0.0001),
        ("optimizer.learning_rate=5", "optimizer", "learning_rate", 5.0),
        ("schedule.steps=10", "schedule", "steps", 10),
        ("algorithm.importance_cap=null", "algorithm", "importance_cap", None),
        ("data.path=null", "data", "path", None),
        ("data.path=~", "data", "path", None),
        ("model.max_pixels=4e5", "model", "max_pixels", 400_000),
        ("model.max_pixels=400_000", "model", "max_pixels", 400_000),
        ("algorithm.importance_cap=", "algorithm", "importance_cap", None),
        ("model.freeze_vision=true", "model", "freeze_vision", True),
        ("model.freeze_vision=false", "model", "freeze_vision", False),
        ("optimizer.betas=[0.8,0.95]", "optimizer", "betas", (0.8, 0.95)),
        ("data.classes=[rose,tulip]", "data", "classes", ["rose", "tulip"]),
        ("prompt.subject=pink primrose", "prompt", "subject", "pink primrose"),
        ("model.path=Qwen/Qwen2-VL-2B-Instruct", "model", "path", "Qwen/Qwen2-VL-2B-Instruct"),
        ("prompt.subject=a=b", "prompt", "subject", "a=b"),
    ],
)
def test_an_override_has_its_type(tmp_path, override, section, key, value):
    found = getattr(getattr(load(tmp_path, MINIMAL, override), section), key)
    assert (found, type(found)) == (value, type(value))


def test_the_home_folder_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load(
        tmp_path, MINIMAL, "model.path=~/x", "run.folder=~/runs", "data.path=$HOME/a", "data.manifest=${HOME}/m"
    )
    assert (config.model.path, config.run_folder) == ("/home/me/x", Path("/home/me/runs/mine"))
    assert (config.data.path, config.data.manifest) == (Path("/home/me/a"), Path("/home/me/m"))


def test_floats_in_a_file_need_no_point(tmp_path):
    # Plain YAML reads 1e-4 as text.
    assert load(tmp_path, MINIMAL + "optimizer: {learning_rate: 1e-4}\n").optimizer.learning_rate == 0.0001


def test_an_override_beats_the_file_and_the_last_one_wins(tmp_path):
    config = load(tmp_path, MINIMAL, "schedule.steps=7", "schedule.steps=9")
    assert (config.schedule.steps, config.schedule.prompts_per_step) == (9, 2)


def test_a_reward_section_stands_as_it_is(tmp_path):
    assert load(tmp_path, MINIMAL + "rewards: {accuracy: 1}\n").rewards == {"accuracy": 1.0}
    text = MINIMAL + "rewards: {accuracy: 1, my_package.my_module:brevity: 0.1}\n"
    assert load(tmp_path, text).rewards == {"accuracy": 1.0, "my_package.my_module:brevity": 0.1}


def test_overriding_one_reward_leaves_the_others(tmp_path):
    text = MINIMAL + "rewards: {format: 0.5, accuracy: 1}\n"
    assert load(tmp_path, text, "rewards.accuracy=2").rewards == {"format": 0.5, "accuracy": 2.0}
    assert load(tmp_path, MINIMAL, "rewards.accuracy=2").rewards == {"format": 1.0, "accuracy": 2.0}


@pytest.mark.parametrize("name", ["my_package.my_module:brevity", "my_package.my_module.brevity", "module:f"])
def test_a_reward_of_ones_own_is_added_by_an_override(tmp_path, name):
    """Its dots are its own, and no sections."""
    added = {"format": 1.0, "accuracy": 1.0, name: 0.1}
    assert load(tmp_path, MINIMAL, f"rewards.{name}=0.1").rewards == added
    text = MINIMAL + f"rewards: {{accuracy: 1, {name}: 0.5}}\n"
    assert load(tmp_path, text, f"rewards.{name}=0.2", f"rewards.{name}=1e-1").rewards == {"accuracy": 1.0, name: 0.1}


@pytest.mark.parametrize("value", ["refuse", "warn", "off"])
def test_each_way_to_red_team_can_be_written_bare(tmp_path, value):
    """Though YAML alone reads off as false."""
    assert load(tmp_path, MINIMAL, f"scoring.red_team={value}").scoring.red_team == value
    config = load(tmp_path, MINIMAL + f"scoring: {{red_team: {value}}}\n")
    assert config.scoring.red_team == value
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_a_config_is_frozen(tmp_path):
    config = load(tmp_path, MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.schedule.steps = 5


# --- refusals: the key, the value, what is allowed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.stpes=3", "schedule.stpes: unknown key; did you mean schedule.steps?"),
        ("optimizer.learnin_rate=3", "optimizer.learnin_rate: unknown key; did you mean optimizer.learning_rate?"),
        ("schedul.steps=3", "schedul: unknown key; did you mean schedule?"),
        ("sampling.zzz=3", "sampling.zzz: unknown key; known here: group_size, temperature, max_tokens"),
        ("zzz.zzz=3", "zzz: unknown key; known here: run, model, data,"),
    ],
)
def test_an_unknown_key_in_an_override_gets_the_nearest(tmp_path, override, message):
    assert message in refusal(tmp_path, override)


def test_an_unknown_key_in_the_file_gets_the_nearest(tmp_path):
    assert "modle: unknown key; did you mean model?" in refusal(tmp_path, text=MINIMAL.replace("model:", "modle:"))
    message = refusal(tmp_path, text=MINIMAL.replace("prompts_per_step", "prompts_per_stp"))
    assert "schedule.prompts_per_stp: unknown key; did you mean schedule.prompts_per_step?" in message
    assert "schedule.prompts_per_step: missing" in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("schedule.steps=ten", ["schedule.steps:", "integer", "'ten'"]),
        ("schedule.steps=1.5", ["schedule.steps:", "integer", "1.5"]),
        ("schedule.steps=null", ["schedule.steps:", "integer", "'null'"]),
        ("schedule.steps=true", ["schedule.steps:", "integer", "'true'"]),
        ("schedule.steps=0", ["schedule.steps:", "greater than or equal to 1", "got 0"]),
        ("schedule.steps.more=3", ["schedule.steps:", "integer", "'more': '3'"]),
        ("sampling.group_size=1", ["sampling.group_size:", "greater than or equal to 2", "got 1"]),
        ("sampling.temperature=0", ["sampling.temperature:", "greater than 0", "got 0"]),
        ("algorithm.clip_low=1", ["algorithm.clip_low:", "less than 1", "got 1"]),
        ("algorithm.kl_beta=-0.1", ["algorithm.kl_beta:", "greater than or equal to 0", "-0.1"]),
        ("algorithm.importance_cap=0", ["algorithm.importance_cap:", "greater than 0", "got 0"]),
        ("optimizer.learning_rate=fast", ["optimizer.learning_rate:", "number", "'fast'"]),
        ("optimizer.learning_rate=.nan", ["optimizer.learning_rate:", "nan"]),
        ("optimizer.learning_rate=.inf", ["optimizer.learning_rate:", "number", "inf"]),
        ("optimizer.learning_rate=inf", ["optimizer.learning_rate:", "finite", "inf"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas.1: missing"]),
        ("optimizer.betas=[0.9,1.5]", ["optimizer.betas.1:", "less than 1", "1.5"]),
        ("model.freeze_vision=maybe", ["model.freeze_vision:", "boolean", "'maybe'"]),
        ("model.lora=yes", ["model.lora:", "must hold keys", "'yes'"]),
        ("model.lora.rnak=4", ["model.lora.rnak: unknown key; did you mean model.lora.rank?"]),
        ("model.max_pixels=100", ["model.max_pixels:", "784", "got 100"]),  # 28 * 28
        ("data.classes=rose", ["data.classes:", "list", "'rose'"]),
        ("data.shots=0", ["data.shots:", "greater than or equal to 1", "got 0"]),
        ("rewards.accuracy=high", ["rewards.accuracy:", "number", "'high'"]),
        ("rewards.accuracy=[1]", ["rewards.accuracy:", "number", "[1]"]),
        ("rewards.my.module:f=high", ["rewards.my.module:f:", "number", "'high'"]),
        ("scoring.time_limit=0", ["scoring.time_limit:", "greater than 0", "got 0"]),
        ("scoring.failure_budget=1", ["scoring.failure_budget:", "less than 1", "got 1"]),
        ("scoring.red_team=on", ["scoring.red_team:", "'refuse', 'warn' or 'off'", "'on'"]),
        ("scoring.red_team=maybe", ["scoring.red_team:", "'refuse', 'warn' or 'off'", "'maybe'"]),
        ("run.name=a/b", ["run.name:", "may hold letters", "'a/b'"]),
        ("run.name=..", ["run.name:", "may hold letters", "'..'"]),
        ("run.seed=-1", ["run.seed:", "greater than or equal to 0", "got -1"]),
        ("cluster.device=tpu", ["cluster.device:", "'cpu' or 'cuda'", "'tpu'"]),
        ("generators.gpu_memory=1.1", ["generators.gpu_memory:", "less than or equal to 1", "1.1"]),
        ("learners.gpus=-1", ["learners.gpus:", "greater than or equal to 0", "got -1"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(tmp_path, override, parts):
    message = refusal(tmp_path, override)
    assert all(part in message for part in parts), message


def test_every_problem_is_named_at_once(tmp_path):
    message = refusal(tmp_path, "schedule.steps=0", "data.shots=0", "run.nmae=x")
    assert len(message.splitlines()) == 1 + 3
    assert "mine.yaml" in message.splitlines()[0]


def test_missing_keys_are_named(tmp_path):
    message = refusal(tmp_path, text="run: {name: mine}\ndata: {shots: 2}\n")
    for key in ("model", "schedule", "data.source"):
        assert f"  {key}: missing" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=photo", "model.family=qwen3_vl"], "family qwen3_vl is for path: tiny alone"),
        (["model.family=qwen3"], "qwen3_vl"),
        (["model.min_pixels=4000", "model.max_pixels=3136"], "min_pixels 4000 is above max_pixels 3136"),
        (["model.min_image_tokens=600"], "min_image_tokens 600 is above max_image_tokens 512"),
        (
            ["model.max_pixels=200_704", "model.max_image_tokens=256"],
            "max_pixels cannot be set beside max_image_tokens: give the number of tokens alone",
        ),
        (["optimizer.warmup_steps=4"], "optimizer.warmup_steps (4) must be below schedule.steps (4)"),
        (["cluster.device=cuda"], "generators.gpus is 0 but cluster.device is cuda: give each of the generators a GPU"),
        (
            ["cluster.device=cuda", "generators.gpus=1"],
            "learners.gpus is 0 but cluster.device is cuda: give each of the learners a GPU",
        ),
        (["generators.gpus=2"], "generators.gpus is 2 but cluster.device is cpu: set it to 0"),
        (["learners.gpus=0.5"], "learners.gpus is 0.5 but cluster.device is cpu: set it to 0"),
        (["learners.cpus=0"], "learners.cpus is 0 but cluster.device is cpu: they compute there, so set it above 0"),
    ],
)
def test_sections_that_disagree_are_refused(tmp_path, overrides, message):
    assert message in refusal(tmp_path, *overrides)


@pytest.mark.parametrize("override", ["steps=3", "schedule.steps", "schedule.steps:3", "--steps", "=3", ""])
def test_an_override_of_another_form_is_shown_the_right_one(tmp_path, override):
    message = refusal(tmp_path, override)
    assert message == f"override {override!r} must look like section.key=value, e.g. schedule.steps=10"


@pytest.mark.parametrize(
    "override", ["rewards.=3", ".steps=3", "schedule.=3", "schedule..steps=3", "data.classes=[1", "run.name=${x}"]
)
def test_an_override_that_cannot_be_read_is_refused(tmp_path, override):
    refusal(tmp_path, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [1\n", "cannot be read"),
        ("run:\n\tname: x\n", "cannot be read"),
        (MINIMAL + "run: {name: again}\n", "duplicate key run"),
        ("run: !!python/object/apply:os.getcwd []\n", "cannot be read"),
        ("run: {name: '${nothing}'}\n", "nothing"),
        ("- run\n- model\n", "must hold keys and values"),
        ("5\n", "must hold keys and values"),
        ("", "run: missing"),
        (MINIMAL.replace("{path: tiny}", ""), "model: "),
        (MINIMAL.replace("{path: tiny}", "tiny"), "model: "),
        (MINIMAL + "5: 6\n", "5: "),
    ],
)
def test_a_file_that_is_not_a_configuration_is_refused(tmp_path, text, message):
    found = refusal(tmp_path, text=text)
    assert message in found
    assert "mine.yaml" in found


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"mine\.yaml .*cannot be read"):
        load_config(str(tmp_path / "mine.yaml"), [])


@pytest.mark.parametrize("folder", ["", "mine", "a b/c"])
@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
@pytest.mark.parametrize("slip", [lambda name: name[:-1], lambda name: name + "s", lambda name: name.replace("o", "u")])
def test_a_mistyped_path_is_told_its_neighbour(tmp_path, monkeypatch, folder, suffix, slip):
    monkeypatch.chdir(tmp_path)
    right = Path(folder, f"roses{suffix}")
    right.parent.mkdir(parents=True, exist_ok=True)
    right.write_text(MINIMAL)
    wrong = Path(folder, slip("roses") + suffix)
    for read in (lambda: load_config(str(wrong), []), lambda: read_file(wrong)):
        with pytest.raises(UserError, match=re.escape(f"Did you mean {right}?")):
            read()


LISTS = {"data.classes": "rose{}tulip", "data.only": "rose{}tulip", "data.aliases.rose": "red{}pink"}
LISTS |= {
    "data.aliases.tulip": "a tulip",
    "tracking": "tensorboard{}wandb",
    "baselines": "base{}sft",
    "optimizer.betas": "0.9{}0.95",
}


@pytest.mark.parametrize("key", LISTS)
@pytest.mark.parametrize("between", [",", ", "])
@pytest.mark.parametrize("around", ["{}", "({})", "({},)"])
def test_of_a_word_in_a_lists_place_the_list_that_is_named_works(tmp_path, key, between, around):
    written = around.format(LISTS[key].format(between))
    message = refusal(tmp_path, f"{key}={written}")
    assert "must be a list" in message and "quotes" not in message
    cure = re.search(r"write (\[.*\])", message)[1]
    load(tmp_path, MINIMAL, f"{key}={cure}")


@pytest.mark.parametrize("word", ["yes", "true", "16", "''", "~x"])
@pytest.mark.parametrize(
    "section", [*(name for name in Config.model_fields if name not in ("tracking", "baselines")), "model.lora"]
)
def test_of_a_word_in_a_sections_place_its_keys_are_named(tmp_path, section, word):
    name, _, inner = section.partition(".")
    text = MINIMAL.replace("{path: tiny}", f"{{path: tiny, lora: {word}}}") if inner else f"{name}: {word}\n"
    if not inner:
        text += "".join(line for line in MINIMAL.splitlines(True) if not line.startswith(f"{name}:"))
    message = refusal(tmp_path, text=text)
    assert f"{section}: must hold keys and values, got" in message
    inside = LoraSection if inner else Config.model_fields[name].annotation
    if name != "rewards":
        assert f"its keys are {', '.join(inside.model_fields)}" in message


@pytest.mark.parametrize("key", ["schedule.steps", "data.shots", "optimizer.learning_rate", "model.freeze_vision"])
@pytest.mark.parametrize("before", [" ", "  ", "\t"])
@pytest.mark.parametrize("behind", ["", " "])
def test_blanks_around_an_override_s_key_do_not_count(tmp_path, key, before, behind):
    section, _, name = key.partition(".")
    config = load(tmp_path, MINIMAL, f"{behind}{key}{before}=1")
    assert getattr(getattr(config, section), name) == 1


@pytest.mark.parametrize("section", ["prompt", "sampling", "scoring", "generators", "learners"])
def test_a_key_without_a_value_is_told_what_can_be_written(tmp_path, section):
    lines = [line for line in MINIMAL.splitlines(True) if not line.startswith(f"{section}:")]
    message = refusal(tmp_path, text="".join(lines) + f"{section}:\n")
    assert f"{section}: no value stands here; give it one, or leave the line out (line" in message
    load(tmp_path, "".join(lines))


@pytest.mark.parametrize(
    ("variable", "overrides", "shown"),
    [
        (None, [], 0),
        ("true", [], 4),
        ("True", [], 4),
        ("false", [], 0),
        ("true", ["debug.rollouts=0"], 0),
        (None, ["debug.rollouts=2"], 2),
    ],
)
def test_debug_mode_is_asked_for_as_in_visual_rft_or_by_its_key(elsewhere, monkeypatch, variable, overrides, shown):
    monkeypatch.delenv("DEBUG_MODE", raising=False)
    if variable:
        monkeypatch.setenv("DEBUG_MODE", variable)
    assert load(elsewhere, MINIMAL, *overrides).debug.shown == shown


@pytest.mark.parametrize(
    ("limits", "pixels", "note"),
    [
        ({}, (4 * 28**2, 512 * 28**2), None),
        ({"max_image_tokens": 256}, (4 * 28**2, 256 * 28**2), None),
        ({"min_image_tokens": None, "max_image_tokens": 256}, (4 * 28**2, 256 * 28**2), None),
        ({"max_pixels": 200_704}, (3136, 200_704), "model.min_image_tokens=4 model.max_image_tokens=256"),
        ({"min_pixels": 784, "max_pixels": 1000}, (784, 1000), "model.min_image_tokens=1 model.max_image_tokens=1"),
        (dict.fromkeys(("min_image_tokens", "max_image_tokens")) | {"max_pixels": 3136}, (3136, 3136), "tokens=4"),
    ],
)
def test_images_are_limited_in_tokens_and_by_older_files_in_pixels(limits, pixels, note):
    model = ModelSection(path="tiny", **limits)
    assert model.pixels(28) == pixels
    assert (note in model.pixels_note(28)) if note else not model.pixels_note(28)
    assert ModelSection(**model.model_dump()) == model, "it is read back as it was written"


def test_a_token_of_another_family_has_other_pixels():
    assert ModelSection(path="tiny", family="qwen3_vl").pixels(32) == (4 * 32**2, 512 * 32**2)
