"""publish.py and model_card.py: what others get is on a list, certified, and loads; --push_to_hub uploads the same."""

import json
import os
import re
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import bugs
import huggingface_hub
import pytest
import yaml
from conftest import ROOT, make_dataset, make_trainer, read_report, sample, tiny_gpt2
from mutation import catches
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from author_dp.accounting.ledger import PrivacyLedger
from author_dp.errors import UserError
from author_dp.models.weights import check_weights, hash_weights
from author_dp.outputs.guarantee import guarantee_with_base
from author_dp.outputs.publish import main, publish

NAMES = {"privacy.json", "README.md", "tokenizer.json", "tokenizer_config.json"}
FILES = {
    "full": NAMES | {"model.safetensors", "config.json", "generation_config.json"},
    "lora": NAMES | {"adapter_model.safetensors", "adapter_config.json"},
}


def run(folder: Path, kind: str = "full", **options):
    """Two steps of the demo's model with a checkpoint after each, and all that a run leaves in its folder."""
    model = AutoModelForCausalLM.from_pretrained(ROOT / "demo" / "model")
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, fan_in_fan_out=True, target_modules=["c_attn"]))
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **options}
    trainer = make_trainer(folder, model, make_dataset([2, 3] * 20), **options)
    trainer.processing_class = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    return trainer


@pytest.fixture(scope="module", params=["full", "lora"])
def result(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("result") / "mine"
    run(folder, request.param)
    return request.param, folder


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    run(folder := tmp_path_factory.mktemp("full") / "mine")
    return folder


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@catches("a list of what is private instead", "outputs.publish.copy_publishable",
    "for pattern in COPIED for path in folder.glob(pattern)",
    "for path in folder.iterdir() if path.name not in ('trainer_state.json', 'training_args.bin', REPORT_NAME)",
    place="")  # fmt: skip
@pytest.mark.parametrize("place", ["", "checkpoint-1"])
def test_exactly_the_listed_files_are_copied(result, tmp_path, place):
    kind, folder = result
    for name in ("losses.csv", "model.safetensors.bak", "_secret.json", "tokenizer.json.tmp"):  # which no list could foresee
        (folder / place / name).write_text("private")
    held = {path.name for path in (folder / place).iterdir()}
    left_out = publish(folder / place, tmp_path / "out")
    assert names_in(tmp_path / "out") == FILES[kind] and set(left_out) == held - FILES[kind]
    assert {"training_args.bin", "losses.csv"} <= set(left_out)


@catches("the number of samples is published", "outputs.publish.copy_publishable",
    "write_json(temporary / REPORT_NAME, report)", "shutil.copyfile(folder / REPORT_NAME, temporary / REPORT_NAME)")  # fmt: skip
def test_nothing_private_is_in_what_is_published(result, tmp_path):
    kind, folder = result
    publish(folder, tmp_path / "out")
    assert read_report(folder)["num_samples"] == 100
    report = read_report(tmp_path / "out")
    assert "num_samples" not in report and report["epsilon"] == read_report(folder)["epsilon"]
    assert report["num_authors"] == 40 and report["weights"] == read_report(folder)["weights"]
    for name in FILES[kind] - {"tokenizer.json", "model.safetensors", "adapter_model.safetensors"}:  # in noise anything stands
        assert not re.search(rb"loss|num_samples|\b100\b", (tmp_path / "out" / name).read_bytes()), name
    local = [name for name in FILES[kind] if str(ROOT).encode() in (tmp_path / "out" / name).read_bytes()]
    assert local == (["adapter_config.json"] if kind == "lora" else [])  # where peft looks for a base that is on no hub


@catches("times that tell how long steps took", "outputs.publish.make_publishable", "os.utime(path, (MTIME, MTIME))", "pass")
def test_all_may_read_it_and_times_tell_nothing(full, tmp_path):
    publish(full, tmp_path / "out")
    paths = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_file()} == {0o644}
    assert paths[0].stat().st_mode & 0o777 == 0o755
    assert len({path.stat().st_mtime for path in paths}) == 1


def test_the_code_in_the_card_loads_and_runs_the_model(result, tmp_path, monkeypatch, capsys):
    kind, folder = result
    publish(folder, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    monkeypatch.chdir(tmp_path / "out")
    found: dict = {}
    exec(code.replace("max_new_tokens=40", "max_new_tokens=3"), found)
    assert len(capsys.readouterr().out) > 3 and ("Peft" in type(found["model"]).__name__) is (kind == "lora")


def test_the_card_tells_library_base_settings_and_guarantee(result, tmp_path):
    kind, folder = result
    report = read_report(folder)
    report["settings"]["model_name"], report["data"] = "gpt2", {"dataset": "webis/tldr-17", "sequence_len": 64}
    (folder / "privacy.json").write_text(json.dumps(report))
    publish(folder, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == "gpt2" and metadata["datasets"] == ["webis/tldr-17"]
    assert metadata["library_name"] == ("peft" if kind == "lora" else "transformers")
    assert (
        metadata["pipeline_tag"] == "text-generation" and "differential-privacy" in metadata["tags"] and "license" not in metadata
    )
    for row in (
        "| learning_rate | 1 |",
        "| optim | sgd |",
        "| sequence_len | 64 |",
        "| Privacy unit |",
        "| Membership inference |",
    ):
        assert row in card
    assert ("| lora_target_modules | ['c_attn'] |" in card) is (kind == "lora")


@pytest.mark.integration
def test_a_local_base_model_has_no_path_in_the_card(tmp_path):
    text = (run(tmp_path, max_steps=1).folder / "README.md").read_text()
    assert "base_model" not in text and str(ROOT) not in text


# --- what is refused --------------------------------------------------------------------------------------


@catches("publish without a look at the weights", *bugs.WEIGHTS_NOT_CHECKED)
def test_other_weights_are_not_published(full, tmp_path):
    weights = full / "model.safetensors"
    certified = weights.read_bytes()
    try:
        weights.write_bytes(certified[:-1] + bytes([certified[-1] ^ 1]))
        with pytest.raises(UserError, match="SHA-256"):
            publish(full, tmp_path / "out")
    finally:
        weights.write_bytes(certified)
    (full / "adapter_model.safetensors").write_bytes(b"of a run without privacy")
    try:
        with pytest.raises(UserError, match="does not certify adapter_model"):
            publish(full, tmp_path / "out")
    finally:
        (full / "adapter_model.safetensors").unlink()
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir()) == []


@catches("weights that changed meanwhile", "outputs.publish.copy_publishable",
    'if hash_weights(temporary) != report["weights"]:', "if False:")  # fmt: skip
def test_weights_that_change_while_they_are_copied_are_not_published(full, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.copyfile", lambda source, target: Path(target).write_bytes(b"of the next checkpoint"))
    with pytest.raises(UserError, match="changed while they were copied"):
        publish(full, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []  # nothing half-way


@catches("a model without a guarantee is published", "outputs.publish.publishable_report",
    "if reason := why_no_guarantee(guarantee):", "if reason := None:", change={"epsilon": None}, words="infinite")  # fmt: skip
@pytest.mark.parametrize(
    ("change", "words"),
    sample(
        [
            ({"disable_dp": True}, "--disable_dp"),
            ({"epsilon": None}, "infinite"),
            ({"alarm": "the noise is wrong"}, "the noise is wrong"),
            ({"base_model": {"name": "x", "covered": False, "reason": "none"}}, "started from another one"),
            ({"weights": None}, "names no weights"),
        ],
        of=2,
    ),
)
def test_a_result_without_a_guarantee_is_not_published(full, tmp_path, change, words):
    copy = tmp_path / "copy"  # without its ledger, which would tell epsilon
    publish(full, copy)
    (copy / "privacy.json").write_text(json.dumps({**read_report(copy), **change}))
    with pytest.raises(UserError, match=words):
        publish(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_is_not_published(full, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "privacy_ledger.jsonl").write_bytes((full / "privacy_ledger.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"holds no privacy\.json"):
        publish(tmp_path / "run", tmp_path / "out")


@catches("whatever privacy.json calls weights", "outputs.publish.publishable_report", "if not names.fullmatch(name)",
    "if not name")  # fmt: skip
def test_only_names_that_a_run_saves_can_be_weights(full, tmp_path):
    """A privacy.json that was edited names whatever is to be published as weights."""
    publish(full, copy := tmp_path / "copy")
    report = read_report(copy)
    (copy / "held_out.bin").write_bytes(b"texts")
    report["weights"] = hash_weights(copy)
    (copy / "privacy.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"held_out\.bin"):
        publish(copy, tmp_path / "out")


def test_an_out_that_holds_something_is_left_alone(full, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "file", full):
        with pytest.raises(UserError, match=r"OUT .* exists"):
            publish(full, out)
    (tmp_path / "empty").mkdir()
    main([str(full), str(tmp_path / "empty")])
    said = capsys.readouterr().out
    assert "epsilon" in said and "left out: " in said and "training_args.bin" in said
    with pytest.raises(UserError, match="usage"):
        main([str(full)])


@catches("a published model within the run", "outputs.publish.check_publish_target",
    "if out.resolve().is_relative_to(parent.resolve())",
    "if False", place="", out="a/b")  # fmt: skip
@pytest.mark.parametrize(
    ("place", "out"), [("", "public"), ("", "a/b"), ("checkpoint-1", "public"), ("checkpoint-1", "checkpoint-1/a")]
)
def test_an_out_within_the_folder_is_refused(full, tmp_path, place, out):
    """There it would be taken for weights of the run, which could not be resumed."""
    with pytest.raises(UserError, match=r"OUT .* lies in"):
        publish(full / place, full / out)
        pytest.fail("published")
    (tmp_path / "link").symlink_to(full)
    with pytest.raises(UserError, match=r"OUT .* lies in"):
        publish(full / place, tmp_path / "link" / out)
        pytest.fail("published")
    assert not (full / out).exists()


@catches("a link is published", "outputs.publish.copy_publishable", " and not path.is_symlink()", "")
def test_a_file_that_is_a_link_is_left_out(full, tmp_path):
    """It may lead anywhere."""
    publish(full, copy := tmp_path / "copy")
    (tmp_path / "private").write_text("texts")
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").symlink_to(tmp_path / "private")
    (copy / os.fsdecode(b"caf\xe9.txt")).write_text("a name that is not UTF-8")
    left_out = publish(copy, tmp_path / "out")
    assert "tokenizer.json" in left_out and not (tmp_path / "out" / "tokenizer.json").exists()
    assert " ".join(left_out).encode()  # or it could not be printed


# --- the hub ----------------------------------------------------------------------------------------------


class FakeHub:
    """Records what is uploaded."""

    def __init__(self, monkeypatch):
        self.uploads: list[tuple[str, set[str]]] = []
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/mine"))
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda _, **options: self.upload(**options))

    def upload(self, folder_path, commit_message, run_as_future=False, **_):
        self.uploads.append((commit_message, names_in(Path(folder_path))))
        self.folder, card = Path(folder_path), Path(folder_path) / "README.md"
        self.card = card.read_text() if card.exists() else ""
        done: Future = Future()
        done.set_result(None)
        return done if run_as_future else None


@pytest.mark.integration
@catches("the folder itself is uploaded", "outputs.publish.publish_to_hub",
    'copy_publishable(folder, temporary / "model", publishable_report(folder), repo)',
    'shutil.copytree(folder, temporary / "model")', kind="full")  # fmt: skip
@catches("the Trainer's own upload of checkpoints", "outputs.uploads.UploadingTrainer._push_from_checkpoint",
    "if not self.is_world_process_zero()",
    "return CertifiedTrainer._push_from_checkpoint(self, checkpoint_folder)\n    if not self.is_world_process_zero()",
    kind="full")  # fmt: skip
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_hub_gets_what_publish_copies(tmp_path, monkeypatch, kind):
    hub = FakeHub(monkeypatch)
    run(tmp_path / "a", kind, push_to_hub=True)
    assert [message for message, _ in hub.uploads] == [
        "Training in progress, step 1",
        "Training in progress, step 2",
        "Model save",
    ]
    assert hub.uploads[-1][1] == FILES[kind] and 'name = "me/mine"' in hub.card
    assert {frozenset(files) for _, files in hub.uploads} == {frozenset(FILES[kind])}
    assert not hub.folder.exists()  # the copy is deleted
    check_weights(tmp_path / "a", read_report(tmp_path / "a"))  # and the folder is as it was
    trainer = run(tmp_path / "b", kind, push_to_hub=True, hub_strategy="end")
    trainer.push_to_hub(commit_message="again")
    assert [message for message, _ in hub.uploads[3:]] == ["Model save", "again"]


@catches("checkpoints with losses are uploaded", "guards.options.check_upload_options",
    "not in (HubStrategy.END, HubStrategy.EVERY_SAVE)", "in (HubStrategy.ALL_CHECKPOINTS,)",
    options={"hub_strategy": "checkpoint"}, words="--hub_strategy checkpoint")  # fmt: skip
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hub_strategy": "checkpoint"}, "--hub_strategy checkpoint"),
        ({"hub_strategy": "all_checkpoints"}, "--hub_strategy all_checkpoints"),
        ({"privacy": {"disable_dp": True}}, "--push_to_hub: it publishes models with a guarantee only, and --disable_dp"),
        ({"privacy": {"noise_multiplier": 0.0}}, "--noise_multiplier 0"),
        ({"privacy": {"part_of_search": True}}, "--part_of_search"),
    ],
)
def test_uploads_of_more_or_without_a_guarantee_are_refused(tmp_path, monkeypatch, options, words):
    FakeHub(monkeypatch)
    with pytest.raises(UserError, match=words):
        make_trainer(tmp_path, tiny_gpt2(), push_to_hub=True, **options)


@catches("an upload that fails at its first checkpoint", "outputs.uploads.UploadingTrainer.rehearse", "self.args.push_to_hub",
    "False")  # fmt: skip
def test_an_upload_of_a_model_without_a_guarantee_is_refused_before_the_first_step(tmp_path, monkeypatch):
    FakeHub(monkeypatch)
    base = {"name": "a", "covered": False, "reason": "no privacy"}
    for name, value, words in (("base_model", base, "started from another one"), ("dry_run", True, "a dry run")):
        trainer = make_trainer(tmp_path, tiny_gpt2(), push_to_hub=True, rehearsal=True)
        setattr(trainer.run_report, name, value)
        with pytest.raises(UserError, match=f"--push_to_hub: there will be no guarantee .*{words}"):
            trainer.train()
            pytest.fail("trained")
        assert not trainer.state.global_step and not PrivacyLedger(tmp_path / "privacy_ledger.jsonl").runs


def test_messages_name_publish_and_not_the_folder():
    """Nobody is told to upload --output_dir, which holds losses."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("author_dp/*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]:
        text = path.read_text()
        assert "upload --output_dir" not in text, path
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@catches("the training of the starting model left out", "outputs.guarantee.guarantee_with_base",
    'model = model.get("base_model")', "model = None")  # fmt: skip
def test_epsilons_of_all_trainings_add_up():
    first = {"covered": True, "epsilon": 1.0, "delta": 1e-6}
    second = {"covered": True, "epsilon": 2.0, "delta": 1e-5, "base_model": first}
    assert guarantee_with_base({"epsilon": 3.0, "delta": 1e-4, "base_model": second}) == pytest.approx((6.0, 1.11e-4))
    assert guarantee_with_base({"epsilon": 3.0, "delta": 1e-4}) is None
