"""Linear layers through either library against PyTorch's own, and LoRA against PEFT's."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from mpo_lightning.batch import GroupBatch
from mpo_lightning.model import fast_linear as linear
from mpo_lightning.model.fast_linear import (
    FastLinear,
    FastLoraLinear,
    onednn_is_faster,
    use_fast_linear,
)
from mpo_lightning.model.logps import response_logps
from tests.conftest import random_groups, tiny_model


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def products(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, ...]]:
    """The shapes that were multiplied by either library, whatever the processor."""
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: request.param)
    shapes: list[tuple[int, ...]] = []
    original = linear.matmul

    def matmul(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append((*rows.shape, weight.shape[0]))
        return original(rows, weight, bias)

    monkeypatch.setattr(linear, "matmul", matmul)
    return shapes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(13,), (2, 13), (2, 3, 13), (0, 13)], ids=str)
def test_products_and_gradients_are_those_of_float64(
    products: list[Any], shape: tuple[int, ...], frozen: bool, bias: bool
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(13, 29, bias=bias).requires_grad_(not frozen)
    exact = nn.Linear(13, 29, bias=bias, dtype=torch.float64).requires_grad_(not frozen)
    exact.load_state_dict(plain.state_dict())
    model = nn.Sequential(plain)
    use_fast_linear(model)
    assert type(model[0]) is FastLinear
    inputs = torch.randn(shape, requires_grad=True)
    wide = inputs.detach().double().requires_grad_()
    weights = torch.randn(*shape[:-1], 29)
    found, expected = model(inputs), exact(wide)
    assert products
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(inputs.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    for one, other in zip(plain.parameters(), exact.parameters(), strict=True):
        if frozen:
            assert one.grad is None
        else:
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-4)


def test_other_dtypes_and_autocast_go_the_usual_way(products: list[Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 5))
    use_fast_linear(model)
    inputs = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(inputs).dtype == torch.bfloat16
    assert model.double()(inputs.double()).dtype == torch.float64
    assert model.bfloat16()(inputs.bfloat16()).dtype == torch.bfloat16
    assert not products


LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 7},
    "with dropout": {"lora_dropout": 0.5},
    "with a bias": {"lora_bias": True},
    "weight-decomposed": {"use_dora": True},
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("name", LORAS)
def test_lora_is_that_of_peft(products: list[Any], name: str) -> None:
    """Values and gradients, also with the adapter off, merged, or another one active."""
    batch = GroupBatch.from_groups(random_groups([(7, [3, 5]), (4, [6, 2])]))
    results: list[list[Tensor]] = []
    for fast in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(
            r=4, target_modules="all-linear", init_lora_weights=False, **LORAS[name]
        )
        model = get_peft_model(tiny_model(), config)
        if "dropout" not in name:
            model.add_adapter("other", config)
        if fast:
            use_fast_linear(model)
            assert any(type(m) is FastLoraLinear for m in model.modules())
        causal_lm = model.get_base_model()
        torch.manual_seed(1)
        logps = response_logps(causal_lm, batch, layout="shared")
        logps.square().sum().backward()
        results.append([logps, *(p.grad for p in model.parameters() if p.grad is not None)])
        with torch.no_grad(), model.disable_adapter():
            results[-1].append(response_logps(causal_lm, batch, layout="shared"))
        if "dropout" in name:
            continue
        with torch.no_grad():
            model.base_model.set_adapter("other")
            results[-1].append(response_logps(causal_lm, batch, layout="shared"))
            model.base_model.set_adapter(["default", "other"])
            results[-1].append(response_logps(causal_lm, batch, layout="shared"))
            if "bias" in name:
                continue
            model.merge_adapter()
            results[-1].append(response_logps(causal_lm, batch, layout="shared"))
    expected, found = results
    assert len(found) == len(expected) > 28
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-3, atol=1e-4 * float(other.detach().abs().max())
        )


def test_plain_lora_is_computed_together_with_its_layer(products: list[Any]) -> None:
    """PEFT's own way would make its product apart, and three more tensors of the output's size."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    use_fast_linear(model)
    layers = [m for m in model.modules() if isinstance(m, LoraLinear)]
    assert len(layers) == 2 * 7
    batch = GroupBatch.from_groups(random_groups([(7, [3, 5])]))
    with torch.no_grad():
        response_logps(model.get_base_model(), batch, layout="shared")
    # Each layer's product, that of its A, and the head's; that of its B is added in place.
    assert len(products) == 2 * 14 + 1


def test_library_is_chosen_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, faster in {"Intel Xeon": False, "AMD EPYC": True}.items():
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {"cpu_name": name})
        onednn_is_faster.cache_clear()
        assert onednn_is_faster() is faster
    monkeypatch.undo()
    onednn_is_faster.cache_clear()


def test_nothing_changes_in_what_is_saved() -> None:
    model = tiny_model()
    before = list(model.state_dict())
    use_fast_linear(model)
    assert list(model.state_dict()) == before
    assert all(isinstance(m, nn.Linear) for m in model.modules() if "Linear" in type(m).__name__)
