"""eval/ablations.py on a tiny model: every arm trains, in the baseline's seconds, and is compared with it in pairs."""

from __future__ import annotations

import json
import logging
import runpy
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llmqat import metrics
from llmqat.calibrate import GPTQStage, RangesStage, stages
from llmqat.calibrate.gptq import Curvature
from llmqat.layers import QuantConfig, QuantModule, prepare
from llmqat.metrics import top_probabilities
from llmqat.train import QATTrainer
from tests.evaluate.test_scripts import SCRIPTS, headline, run
from tests.tiny import tiny_llama, tiny_tokenizer

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(SCRIPTS)  # as Python does for a script
    SCRIPT = runpy.run_path(str(SCRIPTS / "ablations.py"))
    LEVERS = sys.modules["ablation_levers"]
ARMS, arm_of, steps_of, Seconds = (SCRIPT[name] for name in ("ARMS", "arm_of", "steps_of", "Seconds"))


@pytest.fixture(autouse=True, scope="module")
def _script() -> Iterator[None]:
    logger = logging.getLogger("llmqat")
    level = logger.level
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        patch.setattr(stages, "fusing", nullcontext)  # a compiler takes longer than all that is done here
        yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("ablations")
    tiny_llama().save_pretrained(folder / "original")
    tiny_tokenizer().save_pretrained(folder / "original")
    text, other = folder / "domain.txt", folder / "other.txt"
    text.write_text("".join(f"Sentence {n} of a text for training. " for n in range(120)), encoding="utf-8")
    other.write_text("Words of another kind that windows are made of. " * 4, encoding="utf-8")
    return [
        *("--model", str(folder / "original"), "--text", str(text), "--tokens", "256", "--probe-steps", "1"),
        *("--eval", str(other), "--window", "32", "--max-windows", "4", "--top-k", "384"),
        *("--set", "data.block_size=32", "train.learning_rate=1e-3"),
    ]


@pytest.fixture(scope="module")
def bench(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        calibration = ["--calibrate", "[{stage: ranges, blocks: 4}, {stage: gptq, blocks: 4}]"]
        patch.setattr(sys, "argv", ["ablations.py", *words, *calibration, "--work", str(work)])
        found = SCRIPT["Ablations"](SCRIPT["parse_options"]())
        found.begin()
        return found


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains(name: str, bench: Any, tmp_path: Path) -> None:
    scheme = (ARMS[name].schemes or ("int3",))[0]
    model, calibration, _ = bench.begun(scheme, name)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    recipe, clock = bench.recipe(scheme, name, 3, 0, tmp_path), SCRIPT["Clock"]()
    assert [one["stage"] for one in calibration] == [stage.stage for stage in recipe.calibrate]
    own = {name: settings for name, settings in ARMS[name].stages.items() if "blocks" in settings}
    for stage in recipe.calibrate:  # an arm looks at as much text as the baseline, unless that is what it changes
        assert stage in ARMS[name].then or getattr(stage, "blocks", 4) == own.get(stage.stage, {}).get("blocks", 4)
    blocks = bench.blocks(0, recipe)
    facts = bench.train(bench.options.text, model, blocks, recipe, bench.maker(name, clock))
    assert facts["steps"] == 3
    assert clock.seconds > 0
    after = dict(model.named_parameters())
    assert all(bool(torch.isfinite(parameter).all()) for parameter in after.values())
    assert any(not torch.equal(before[key], parameter) for key, parameter in after.items())
    assert not any("matrix" in vars(module) for module in model.modules())
    assert ARMS[name].about


def test_a_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, table = tmp_path / "out.json", tmp_path / "out.md"
    words = [*words, "--schemes", "int3", "--work", str(tmp_path / "work"), "--json", str(out), "--table", str(table)]
    words += ["--calibrate", "[{stage: ranges, blocks: 4}]", "--arms", "average+lr-2", "freeze", "--seeds"]
    run(monkeypatch, "ablations.py", *words, "0")
    run(monkeypatch, "ablations.py", *words, "0", "1")
    found = headline(capsys.readouterr().out)
    assert list(found)[-1] == "int3, average+lr-2, other kl change"
    whole = json.loads(out.read_text())
    rows = {row["arm"]: row for row in whole["rows"]}
    assert list(rows) == ["baseline", "freeze", "average+lr-2"]
    cells = {(cell["arm"], cell["seed"]): cell for cell in whole["cells"]}
    assert len(cells) == 6
    changed = rows["average+lr-2"]["texts"]["other"]
    by_hand = [
        cells["average+lr-2", seed]["texts"]["other"]["kl"] - cells["baseline", seed]["texts"]["other"]["kl"]
        for seed in (0, 1)
    ]
    assert changed["changes"] == pytest.approx(by_hand, abs=2e-6)
    assert changed["change"] == pytest.approx(sum(by_hand) / 2, abs=2e-6)
    assert changed["low"] <= changed["change"] <= changed["high"]
    assert "change" not in rows["baseline"]["texts"]["other"]
    plan = cells["freeze", 1]["plan"]
    own, baseline = (Seconds(**plan[key]) for key in ("seconds", "baseline_seconds"))
    assert cells["baseline", 0]["plan"] == {"steps": 4, "baseline_steps": 4}
    assert cells["freeze", 1]["training"]["steps"] == plan["steps"] == steps_of(own, baseline, 4)
    assert "frozen share" in cells["freeze", 1]["training"]["levers"]
    assert cells["freeze", 0]["text_sha256"] != cells["freeze", 1]["text_sha256"]
    shown = table.read_text(encoding="utf-8")
    assert f"| average+lr-2 | {rows['average+lr-2']['steps']} |" in shown
    assert f"{changed['change']:+.4f}" in shown

    with monkeypatch.context() as context:
        context.setattr(QATTrainer, "train", None)  # a finished cell is not done again
        run(monkeypatch, "ablations.py", *words, "1", "0")
        run(monkeypatch, "ablations.py", *words, "0", "--report")
        (tmp_path / "earlier.json").write_text(json.dumps(whole))
        run(monkeypatch, "ablations.py", *words, "0", "1", "--work", str(tmp_path / "elsewhere"), "--earlier",
            str(tmp_path / "earlier.json"))  # fmt: skip
    assert json.loads(out.read_text())["rows"] == whole["rows"]
    with pytest.raises(SystemExit, match=r"begun with other settings .*: tokens"):
        run(monkeypatch, "ablations.py", *words, "0", "--tokens", "512")


def test_training_text_is_fresh(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = bench.recipe("int3", "baseline", 4, 0, tmp_path)
    text = bench.text(bench.options.text, 0).ids
    assert torch.equal(bench.blocks(0, recipe).ids, text[80:88])
    assert torch.equal(bench.blocks(1, recipe).ids, text[90:98])  # a quarter more is kept for arms that are faster
    longer = bench.recipe("int3", "baseline", 9, 0, tmp_path)
    assert torch.equal(bench.blocks(0, longer).ids, text[80:90])
    monkeypatch.setattr(bench.options, "reserved", 79)
    with pytest.raises(ValueError, match="looks at 80 blocks; give --reserved 80"):
        bench.recipe("int3", "gptq-80", 4, 0, tmp_path)


def test_steps_of_equal_seconds() -> None:
    baseline = Seconds(calibration=100, step=7)
    assert steps_of(baseline, baseline, 40) == 40
    assert steps_of(Seconds(100, 14), baseline, 40) == 20
    assert steps_of(Seconds(240, 7), baseline, 40) == 20
    assert steps_of(Seconds(30, 7), baseline, 40) == 50
    assert steps_of(Seconds(400, 7), baseline, 40) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("averages", "there is no arm 'averages'"),
        ("lr-2+lr-4", "two of its arms change the same thing"),
        ("cell-0.25+cell-0.4", "two of its arms change the same thing"),
        ("muon+adam-row", "two of its arms change the same thing"),
        ("rotate+rotate-heads", "two of its arms change the same thing"),
        ("ranges-minmax+ranges-mse", "two of its arms change the same thing"),
    ],
)
def test_arms_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arm_of(name)


def test_arms_are_combined() -> None:
    both = arm_of("rotate+blockwise")
    baseline = (RangesStage(blocks=8), GPTQStage(blocks=80))
    stages = both.calibration(baseline)
    assert [stage.stage for stage in stages] == ["rotate", "ranges", "gptq", "blockwise"]
    assert stages[1:3] == baseline
    changed = arm_of("gptq-quantized-target+ranges-mse").calibration(baseline)
    assert changed == (RangesStage(blocks=8, method="mse"), GPTQStage(blocks=80, target="quantized"))
    with pytest.raises(ValueError, match="changes the stage gptq, which --calibrate does not have"):
        arm_of("gptq-80").calibration(baseline[:1])
    arm = arm_of("average+cell-0.25+lr-2")
    assert arm.times == {"learning_rate": 2}
    assert [lever.label() for lever in arm.levers] == ["Averaged()", "Centred(cell=0.25)"]
    assert SCRIPT["trainer_class"](arm.levers).cell == 0.25
    assert arm_of("choose+average").schemes == ("int3", "int2")


def layer_of(scheme: str = "int3") -> QuantModule:
    model = tiny_llama()
    prepare(model, QuantConfig.preset(scheme, group_size=32))
    return next(module for module in model.modules() if isinstance(module, QuantModule))


def test_weights_placed_within_their_cells_keep_their_codes() -> None:
    layer = layer_of()
    codes, before = layer.codes(), layer.matrix().detach().clone()
    LEVERS.place_within(layer, 0.25)
    assert torch.equal(layer.codes(), codes)
    apart = (layer.matrix() - layer.quantized_matrix(torch.float32)).detach().abs() / layer.step_sizes()
    assert float(apart.max()) <= 0.25 + 1e-4
    assert not torch.equal(layer.matrix().detach(), before)


def test_a_code_that_goes_back_and_forth_freezes() -> None:
    layer = layer_of()
    with torch.no_grad():
        level, step = layer.quantized_matrix(torch.float32), layer.step_sizes()
        layer.parameter().copy_(level)
        seen = LEVERS._Seen.of(layer)
        one = int((layer.codes()[0] == 0).nonzero()[0])
        for up in (True, False, True, False):
            layer.parameter().copy_(level)
            layer.parameter()[0, one] += up * step[0, one]
            seen.step(0.1, 0.15)
    assert seen.frozen.nonzero().tolist() == [[0, one]]
    assert float(layer.matrix()[0, one]) == float(level[0, one])  # the rounded mean of its codes


def test_codes_are_drawn_around_weights_and_the_gradient_is_straight_through() -> None:
    layer = layer_of()
    plain = layer.codes()
    with LEVERS.drawn([layer], 0.1):
        assert 0 < float((layer.codes() != plain).float().mean()) < 0.5
        layer.quantized_matrix(torch.float32).sum().backward()
    assert torch.equal(layer.codes(), plain)
    gradient = layer.parameter().grad
    assert gradient is not None
    assert set(gradient.unique().tolist()) <= {0.0, 1.0}


def test_the_mixed_divergence_has_its_gradient() -> None:
    torch.manual_seed(0)
    teacher, weights = torch.randn(3, 50), torch.tensor([[0.5, 0.0], [0.25, 0.0], [0.25, 0.0]])
    top = top_probabilities(teacher, 8)
    logits = torch.randn(3, 50, requires_grad=True)
    log_probs = F.log_softmax(logits, -1)
    own, rest = log_probs.gather(-1, top.indices), log_probs.exp().scatter(-1, top.indices, 0).sum(-1).log()
    known = torch.cat([top.log_probs, top.log_rest[:, None]], -1)
    student = torch.cat([own, rest[:, None]], -1)
    wanted = 0.7 * (known.exp() * (known - student)).sum(-1) + 0.3 * (student.exp() * (student - known)).sum(-1)
    (wanted * weights[:, 0]).sum().backward()
    found, gradient = LEVERS.mixed_kl_(metrics._bucketed_kl_, 0.3, log_probs.detach().clone(), top, weights)
    assert torch.allclose(found, wanted.detach(), atol=1e-6)
    assert torch.allclose(gradient, logits.grad, atol=1e-6)


def test_adam_with_a_moment_of_each_entry_is_torch_s() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    settings = {"betas": (0.9, 0.99), "eps": 1e-8}
    one = LEVERS.SharedAdam([{"params": [ours], "lr": 0.1, "weight_decay": 0.1}], **settings)
    other = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1, **settings)
    for _ in range(3):
        ours.grad = torch.randn(4, 6)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_muon_orthogonalizes() -> None:
    torch.manual_seed(0)
    for shape in ((24, 64), (64, 24)):
        values = torch.linalg.svdvals(LEVERS.orthogonalized(torch.randn(shape)))
        assert 0.5 < float(values.min()) < float(values.max()) < 1.3


def test_gptq_in_the_order_of_features_has_the_same_problem() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(200, 12)
    hessian = inputs.t() @ inputs / 200
    with LEVERS.feature_order():
        found = Curvature.of(hessian)
    assert found.order.tolist() == list(range(12))
    assert torch.allclose(found.factor.t() @ found.factor, torch.linalg.inv(hessian), atol=1e-4)
    assert torch.equal(found.factor, found.factor.triu())
    assert Curvature.of(hessian).order.tolist() != list(range(12))
