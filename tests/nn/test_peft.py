"""PEFT's adapters on top of packed layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_transformers import logits, packed_layers, prompt, tiny, torch, transformers, twin

from lacewing.errors import RequestError
from lacewing.nn import Linear, replace_linear

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    peft = pytest.importorskip("peft", reason="PEFT makes the adapters")

pytestmark = pytest.mark.filterwarnings("ignore")  # of theirs, about each other
TARGETS = ["q_proj", "v_proj", "down_proj"]


def packed() -> Any:
    model = tiny("llama")
    replace_linear(model, "w8a8g32")
    return model


def lora(model: Any | None = None, **options: Any) -> Any:
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model or packed(), peft.LoraConfig(**{**settings, **options}))


def train(model: Any, steps: int = 4, rate: float = 0.5) -> list[float]:
    model.train()
    tokens = prompt(2, 12)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def parts(model: Any) -> dict[str, Any]:
    return {
        f"{name}.{part}": array.copy()
        for name, layer in packed_layers(model).items()
        for part, array in layer.packed.parts.items()
    }


def assert_unchanged(model: Any, before: dict[str, Any]) -> None:
    after = parts(model)
    assert after.keys() == before.keys()
    assert all((after[key] == before[key]).all() for key in before)


def test_a_fresh_adapter_changes_nothing() -> None:
    wanted = logits(packed(), prompt())
    model = lora()
    assert torch.equal(logits(model, prompt()), wanted)
    adapted = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(adapted) == 6
    assert all(isinstance(module.get_base_layer(), Linear) for module in adapted)


def test_adapters_train_and_the_layers_do_not() -> None:
    model = lora(lora_dropout=0.1)
    before = parts(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
    assert_unchanged(model, before)


def test_gradients_are_those_of_the_dequantized_weights() -> None:
    """The gradient of an adapter goes through the packed layers above it: the same, to the order of
    float32 sums, as through dense layers with the dequantized weights and the same outputs."""
    model, x = lora(target_modules=["q_proj"]), prompt(1, 5)
    model(input_ids=x, labels=x).loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    layers = packed_layers(model)
    outputs = {name: [] for name in layers}
    hooks = [
        layer.register_forward_hook(lambda m, i, y, name=name: outputs[name].append(y.detach()))
        for name, layer in layers.items()
    ]
    model(input_ids=x)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        model.set_submodule(name, _Straight(layer.weight.dequantized(), outputs[name][0]))
    model.zero_grad()
    model(input_ids=x, labels=x).loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-6)


class _Straight(torch.nn.Module):
    """A given output with the gradient of a dense product."""

    def __init__(self, weight: Any, output: Any) -> None:
        super().__init__()
        self.weight, self.output = weight, output

    def forward(self, x: Any) -> Any:
        dense = torch.nn.functional.linear(x, self.weight)
        return dense + (self.output - dense).detach()


def test_an_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    model = lora()
    train(model)
    wanted = logits(model, prompt())
    assert not torch.equal(wanted, logits(packed(), prompt()))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(packed(), tmp_path)
    assert torch.equal(logits(again, prompt()), wanted)
    assert torch.equal(logits(twin(again), prompt()), wanted)
    with again.disable_adapter():
        assert torch.equal(logits(again, prompt()), logits(packed(), prompt()))


def test_adapters_of_transformers(tmp_path: Path) -> None:
    model = packed()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    wanted = logits(model, prompt())
    model.save_pretrained(tmp_path)
    again = packed()
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again, prompt()), wanted)


def test_layers_are_replaced_under_an_adapter() -> None:
    dense = tiny("llama")
    model = lora(dense)
    replace_linear(model, "w8a8g32")
    assert torch.equal(logits(model, prompt()), logits(lora(), prompt()))
    assert train(model)[-1] < 5.5


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_adapter(),
        lambda model: model.merge_adapter(safe_merge=True),
        lambda model: model.merge_and_unload(),
    ],
    ids=["merge_adapter", "safely", "merge_and_unload"],
)
def test_a_packed_weight_takes_no_adapter_in(merge: Callable[[Any], Any]) -> None:
    model = lora(init_lora_weights=False)
    before, wanted = parts(model), logits(model, prompt())
    with pytest.raises(RequestError, match="a packed weight is frozen") as caught:
        merge(model)
    assert "unmerged" in (caught.value.hint or "")
    assert_unchanged(model, before)
    assert torch.equal(logits(model, prompt()), wanted)


def test_unloading_gives_the_packed_model_back() -> None:
    model = lora(init_lora_weights=False).unload()
    assert torch.equal(logits(model, prompt()), logits(packed(), prompt()))


OTHERS: dict[str, Callable[[], Any]] = {
    "dora": lambda: peft.LoraConfig(target_modules=TARGETS, use_dora=True, task_type="CAUSAL_LM"),
    "rslora": lambda: peft.LoraConfig(target_modules=TARGETS, use_rslora=True),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "loha": lambda: peft.LoHaConfig(target_modules=TARGETS),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=TARGETS, total_step=10),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods(method: str) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(packed(), OTHERS[method]())
    before = parts(model)
    losses = train(model, rate=0.2)
    assert losses[-1] < losses[0]
    assert_unchanged(model, before)


def test_generation_with_an_adapter() -> None:
    model = lora(init_lora_weights=False).eval()
    tokens = prompt(2)
    ours = model.generate(input_ids=tokens, max_new_tokens=6, do_sample=False)
    theirs = twin(model).generate(input_ids=tokens, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, theirs)


def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the trainer of transformers needs it")
    model = lora()
    rows = [{"input_ids": row, "labels": row} for row in prompt(8, 12)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    before = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < before
