"""What apply and remove do to a model, and through which doors the attention is reached."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lpattn

LAYERS = ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]


def low_calls(model, backend="marked"):
    return {name: layer.low.get(backend, 0) for name, layer in lpattn.attention_report(model).items()}


class TestInPlace:
    def test_returns_the_same_object_and_changes_the_numbers(self, model, x, marked):
        before = model(x)
        assert lpattn.apply_low_precision_attention(model, "marked") is model
        assert not torch.allclose(model(x), before)
        assert low_calls(model) == dict.fromkeys(LAYERS, 1)

    def test_the_reference_changes_nothing(self, model, x):
        before = model(x)
        lpattn.apply_low_precision_attention(model, lpattn.AttentionBackend.BF16_REFERENCE)
        torch.testing.assert_close(model(x), before)
        report = lpattn.attention_report(model)
        assert {name: dict(layer.exact) for name, layer in report.items()} == {key: {"requested": 1} for key in LAYERS}

    def test_remove_restores_exactly(self, model, x, marked):
        before, attributes = model(x), {n: dict(m.__dict__) for n, m in model.named_modules()}
        lpattn.apply_low_precision_attention(model, "marked")
        model(x)
        assert lpattn.remove_low_precision_attention(model) is model
        assert torch.equal(model(x), before)
        assert {n: m.__dict__.keys() for n, m in model.named_modules()} == {n: a.keys() for n, a in attributes.items()}
        assert len(lpattn.attention_report(model)) == 0

    def test_remove_without_apply_is_harmless(self, model, x):
        before = model(x)
        lpattn.remove_low_precision_attention(model)
        assert torch.equal(model(x), before)

    def test_applying_again_replaces(self, model, x, marked, other):
        lpattn.apply_low_precision_attention(model, "marked")
        lpattn.apply_low_precision_attention(model, "other")
        model(x)
        assert not marked.calls
        assert len(other.calls) == 3
        lpattn.remove_low_precision_attention(model)
        model(x)
        assert len(other.calls) == 3

    def test_types_keys_signature_and_hooks_stay(self, model, x, marked):
        types, keys = [type(m) for m in model.modules()], list(model.state_dict())
        signature = inspect.signature(model.blocks[0].attn.forward)
        seen = []
        model.blocks[0].attn.register_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
        lpattn.apply_low_precision_attention(model, "marked")
        model(x)
        assert [type(m) for m in model.modules()] == types
        assert list(model.state_dict()) == keys
        assert inspect.signature(model.blocks[0].attn.forward) == signature
        assert list(signature.parameters) == ["x", "is_causal"]
        assert seen == ["Attention"]

    def test_does_not_run_draw_or_allocate(self, model, marked):
        calls = []
        model.register_forward_pre_hook(lambda *args: calls.append(args))
        state = torch.get_rng_state()
        lpattn.apply_low_precision_attention(model, "marked")
        assert not calls
        assert not marked.calls
        assert torch.equal(torch.get_rng_state(), state)

    def test_works_on_the_meta_device(self, classes, marked):
        with torch.device("meta"):
            model = classes.Model()
            lpattn.apply_low_precision_attention(model, "marked")
        model.to_empty(device="cpu")
        model(torch.randn(1, 4, 32))
        assert len(marked.calls) == 3

    def test_an_error_leaves_the_model_as_it_was(self, model, x, marked):
        before = model(x)
        with pytest.raises(lpattn.UnknownBackendError):
            lpattn.apply_low_precision_attention(model, "marked", layers={"blocks.2": "markd"})
        assert "forward" not in model.blocks[0].attn.__dict__
        assert torch.equal(model(x), before)

    def test_models_are_freed_without_the_garbage_collector(self, classes, x, marked):
        model = lpattn.apply_low_precision_attention(classes.Model().eval(), "marked")
        model(x)
        alive = weakref.ref(model)
        gc.collect()
        gc.disable()
        try:
            del model
            assert alive() is None
        finally:
            gc.enable()

    @pytest.mark.parametrize("wrong", [None, "model", lambda x: x])
    def test_something_that_is_no_module(self, wrong):
        with pytest.raises(lpattn.InvalidArgumentError, match=r"model must be a torch\.nn\.Module; got"):
            lpattn.apply_low_precision_attention(wrong)

    def test_a_module_without_attention_to_wrap(self):
        with pytest.raises(lpattn.InvalidArgumentError, match="no module that could run attention"):
            lpattn.apply_low_precision_attention(nn.Linear(3, 3), "bf16_reference")


class TestDoors:
    def test_submodule_called_directly(self, model, x, marked):
        lpattn.apply_low_precision_attention(model, "marked")
        model.blocks[1](x)
        model.blocks[2].attn(x)
        assert low_calls(model) == {"blocks.1.attn": 1, "blocks.2.attn": 1}

    def test_forward_called_directly(self, model, x, marked):
        lpattn.apply_low_precision_attention(model, "marked")
        model.forward(x)
        model.blocks[0].attn.forward(x)
        assert low_calls(model) == {"blocks.0.attn": 2, "blocks.1.attn": 1, "blocks.2.attn": 1}

    def test_sdpa_imported_by_name(self, classes, x, marked):
        model = lpattn.apply_low_precision_attention(classes.Attention(imported=True).eval(), "marked")
        model(x)
        assert low_calls(model) == {"": 1}

    def test_sdpa_through_torch_c_and_aten(self, x, marked):
        class Direct(nn.Module):
            def forward(self, q):
                return torch._C._nn.scaled_dot_product_attention(q, q, q) + torch.ops.aten.scaled_dot_product_attention(
                    q, q, q
                )

        model = lpattn.apply_low_precision_attention(Direct(), "marked")
        q = torch.randn(1, 2, 4, 8)
        torch.testing.assert_close(model(q), 4 * F.scaled_dot_product_attention(q, q, q))

    def test_inference_mode(self, model, x, marked):
        lpattn.apply_low_precision_attention(model, "marked")
        with torch.inference_mode():
            model(x)
        assert len(marked.calls) == 3

    def test_a_sequential_of_blocks(self, classes, x, marked):
        model = lpattn.apply_low_precision_attention(nn.Sequential(classes.Block(), classes.Block()).eval(), "marked")
        model(x)
        assert low_calls(model) == {"0.attn": 1, "1.attn": 1}

    def test_checkpointed_blocks(self, model, x, marked):
        from torch.utils.checkpoint import checkpoint

        lpattn.apply_low_precision_attention(model, "marked")
        checkpoint(model.blocks[0], x, use_reentrant=False)
        assert low_calls(model) == {"blocks.0.attn": 1}

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
    def test_jit_trace_records_the_operator(self, model, x, marked):
        before = model(x)
        lpattn.apply_low_precision_attention(model, "bf16_reference")
        traced = torch.jit.trace(model, (x,))
        longer = torch.cat([x, x], dim=0)
        torch.testing.assert_close(traced(x), before)
        assert traced(longer).shape[0] == 4
        assert "lpattn::sdpa" in str(traced.inlined_graph)

    def test_export(self, model, x, marked):
        lpattn.apply_low_precision_attention(model, "marked")
        expected = model(x)
        exported = torch.export.export(model, (x,))
        assert "lpattn.sdpa" in str(exported.graph)
        torch.testing.assert_close(exported.module()(x), expected)


class TestOnlyThisModel:
    def test_another_model_is_left_alone(self, classes, model, x, marked):
        bystander = classes.Model().eval()
        before = bystander(x)
        lpattn.apply_low_precision_attention(model, "marked")
        model(x)
        assert torch.equal(bystander(x), before)

    def test_another_model_that_runs_in_a_hook(self, classes, model, x, marked):
        helper = classes.Model().eval()
        before, seen = helper(x), []
        model.blocks[1].register_forward_hook(lambda m, args, out: seen.append(helper(x)))
        lpattn.apply_low_precision_attention(model, "marked")
        model(x)
        assert torch.equal(seen[0], before)
        assert len(marked.calls) == 3

    def test_a_module_added_later_runs_exactly_and_is_reported(self, classes, model, x, marked):
        lpattn.apply_low_precision_attention(model, "marked")
        model.blocks[0] = classes.Block().eval()
        model(x)
        assert len(marked.calls) == 2
        (layer,) = [r for r in lpattn.attention_report(model).values() if "not_applied" in r.exact]
        assert "apply again" in layer.reasons["not_applied"]
        lpattn.apply_low_precision_attention(model, "marked")
        model(x)
        assert len(marked.calls) == 5

    def test_nothing_is_assigned_to_functional(self, model, x, marked):
        original = F.scaled_dot_product_attention
        lpattn.apply_low_precision_attention(model, "marked")
        model(x)
        assert F.scaled_dot_product_attention is original

    def test_sdpa_outside_of_the_model(self, model, x, marked):
        lpattn.apply_low_precision_attention(model, "marked")
        model(x)
        calls = len(marked.calls)
        q = torch.randn(1, 2, 4, 8)
        F.scaled_dot_product_attention(q, q, q)
        assert len(marked.calls) == calls

    def test_an_exception_in_the_forward(self, model, x, marked):
        def fail(*args):
            raise RuntimeError("in the middle")

        lpattn.apply_low_precision_attention(model, "marked")
        handle = model.blocks[1].attn.out.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            model(x)
        handle.remove()
        calls = len(marked.calls)
        q = torch.randn(1, 2, 4, 8)
        F.scaled_dot_product_attention(q, q, q)
        assert len(marked.calls) == calls
        model(x)
        assert len(marked.calls) == calls + 3

    def test_threads(self, classes, x, marked, other):
        """Two models with two backends, and plain SDPA, at the same time; nothing lingers after."""
        torch.manual_seed(0)
        models = {
            backend: lpattn.apply_low_precision_attention(classes.Model().eval(), backend)
            for backend in ("marked", "other")
        }
        expected = {backend: model(x) for backend, model in models.items()}
        q = torch.randn(1, 2, 4, 8)
        plain = F.scaled_dot_product_attention(q, q, q)
        start, failures = threading.Barrier(6), []

        def run(backend):
            with torch.no_grad():
                start.wait()
                for _ in range(30):
                    ok = (
                        torch.equal(F.scaled_dot_product_attention(q, q, q), plain)
                        if backend is None
                        else torch.equal(models[backend](x), expected[backend])
                    )
                    if not ok:
                        failures.append(backend)

        threads = [threading.Thread(target=run, args=(b,)) for b in ("marked", "other", None) * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert low_calls(models["marked"]) == dict.fromkeys(LAYERS, 61)
        assert low_calls(models["other"], "other") == dict.fromkeys(LAYERS, 61)
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), plain)

    def test_a_module_shared_by_two_models(self, classes, x, marked):
        shared = classes.Block().eval()
        first, second = nn.Sequential(shared), nn.Sequential(shared)
        lpattn.apply_low_precision_attention(first, "marked")
        second(x)
        assert len(marked.calls) == 1


class TestNested:
    def test_the_inner_application_wins_in_either_order(self, classes, x, marked, other):
        for inner_first in (True, False):
            model = classes.Model().eval()
            steps = [(model, "marked"), (model.blocks[1], "other")]
            for target, backend in reversed(steps) if inner_first else steps:
                lpattn.apply_low_precision_attention(target, backend)
            model(x)
            assert low_calls(model) == {"blocks.0.attn": 1, "blocks.1.attn": 0, "blocks.2.attn": 1}
            assert low_calls(model, "other")["blocks.1.attn"] == 1

    def test_removing_the_inner_one_uncovers_the_outer_one(self, model, x, marked, other):
        lpattn.apply_low_precision_attention(model, "marked")
        lpattn.apply_low_precision_attention(model.blocks[1], "other")
        lpattn.remove_low_precision_attention(model.blocks[1])
        model(x)
        assert len(marked.calls) == 3
        assert not other.calls

    def test_removing_from_a_part_of_an_applied_model_makes_it_exact(self, model, x, marked):
        lpattn.apply_low_precision_attention(model, "marked")
        lpattn.remove_low_precision_attention(model.blocks[1])
        model(x)
        assert len(marked.calls) == 2

    def test_removing_the_whole_removes_its_parts(self, model, x, marked, other):
        lpattn.apply_low_precision_attention(model, "marked")
        lpattn.apply_low_precision_attention(model.blocks[1], "other")
        lpattn.remove_low_precision_attention(model)
        model(x)
        assert not marked.calls
        assert not other.calls


class TestCopies:
    def test_deepcopy_is_a_model_of_its_own(self, model, x, marked):
        lpattn.apply_low_precision_attention(model, "marked")
        clone = copy.deepcopy(model)
        for parameter in clone.parameters():
            parameter.mul_(1.5)
        assert not torch.allclose(clone(x), model(x))
        assert low_calls(model) == low_calls(clone) == dict.fromkeys(LAYERS, 1)
        lpattn.remove_low_precision_attention(model)
        clone(x)
        assert low_calls(clone) == dict.fromkeys(LAYERS, 2)

    def test_deepcopy_of_a_part(self, model, x, marked):
        lpattn.apply_low_precision_attention(model, "marked")
        clone = copy.deepcopy(model.blocks[0])
        torch.testing.assert_close(clone(x), model.blocks[0](x))
        assert low_calls(clone) == {"attn": 1}

    def test_pickle_keeps_it_applied(self, x, marked):
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
        lpattn.apply_low_precision_attention(layer, "marked", layers={"*": "marked"})
        expected = layer(x)
        loaded = pickle.loads(pickle.dumps(layer))
        torch.testing.assert_close(loaded(x), expected)
        assert low_calls(loaded) == {"self_attn": 1}
        assert lpattn.attention_report(loaded)["self_attn"].provenance == "layer rule"

    def test_torch_save_and_load(self, x, marked):
        layer = lpattn.apply_low_precision_attention(
            nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), "marked"
        )
        expected, buffer = layer(x), io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        torch.testing.assert_close(loaded(x), expected)
        lpattn.remove_low_precision_attention(loaded)
        loaded(x)
        assert len(lpattn.attention_report(loaded)) == 0

    def test_state_dict_round_trip(self, classes, model, x, marked):
        lpattn.apply_low_precision_attention(model, "marked")
        plain = classes.Model().eval()
        plain.load_state_dict(model.state_dict())
        lpattn.remove_low_precision_attention(model)
        torch.testing.assert_close(plain(x), model(x))


class TestCompany:
    def test_a_users_own_instance_forward_is_kept(self, model, x, marked):
        attn = model.blocks[0].attn
        original = attn.forward
        attn.forward = lambda x: original(x, is_causal=False) + 1.0
        own, before = attn.__dict__["forward"], model(x)
        lpattn.apply_low_precision_attention(model, "bf16_reference")
        torch.testing.assert_close(model(x), before)
        lpattn.remove_low_precision_attention(model)
        assert attn.__dict__["forward"] is own

    def test_somebody_wrapped_over_ours(self, model, x, marked):
        before = model(x)
        lpattn.apply_low_precision_attention(model, "marked")
        attn = model.blocks[0].attn
        inner = attn.forward
        attn.forward = lambda x: inner(x)
        model(x)
        assert len(marked.calls) == 3
        lpattn.remove_low_precision_attention(model)
        assert torch.equal(model(x), before)
        assert len(marked.calls) == 3

    def test_parametrized_and_weight_normed_modules(self, model, x, marked):
        from torch.nn.utils.parametrizations import weight_norm

        for order in ("before", "after"):
            clone = copy.deepcopy(model)
            if order == "before":
                weight_norm(clone.blocks[0].attn.qkv)
            lpattn.apply_low_precision_attention(clone, "marked")
            if order == "after":
                weight_norm(clone.blocks[0].attn.qkv)
            clone(x)
            assert low_calls(clone) == dict.fromkeys(LAYERS, 1)

    def test_functional_call(self, model, x, marked):
        lpattn.apply_low_precision_attention(model, "bf16_reference")
        doubled = {name: 2 * p for name, p in model.named_parameters()}
        lpattn.remove_low_precision_attention(model)
        expected = torch.func.functional_call(model, doubled, (x,))
        lpattn.apply_low_precision_attention(model, "bf16_reference")
        torch.testing.assert_close(torch.func.functional_call(model, doubled, (x,)), expected)

    def test_fully_shard_in_both_orders(self, classes, x, marked, tmp_path):
        from torch import distributed
        from torch.distributed.fsdp import fully_shard

        store = distributed.FileStore(str(tmp_path / "store"), 1)
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            mesh = distributed.init_device_mesh("cpu", (1,))
            for order in ("before", "after"):
                torch.manual_seed(0)
                model = classes.Model().eval()
                if order == "after":
                    lpattn.apply_low_precision_attention(model, "marked")
                for block in model.blocks:
                    fully_shard(block, mesh=mesh)
                fully_shard(model, mesh=mesh)
                if order == "before":
                    lpattn.apply_low_precision_attention(model, "marked")
                model(x)
                assert low_calls(model) == dict.fromkeys(LAYERS, 1), order
                lpattn.remove_low_precision_attention(model)
                assert isinstance(model.blocks[0], classes.Block)
                model(x)
        finally:
            distributed.destroy_process_group()

    def test_wrapped_over_and_applied_again(self, model, x, marked):
        lpattn.apply_low_precision_attention(model, "marked")
        attn = model.blocks[0].attn
        inner = attn.forward
        attn.forward = lambda x: inner(x)
        lpattn.apply_low_precision_attention(model, "marked")
        model(x)
        assert low_calls(model) == dict.fromkeys(LAYERS, 1)
        assert len(marked.calls) == 3

    @pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # PyTorch's, without lpattn too
    def test_vmap(self, x, marked):
        class Direct(nn.Module):
            def forward(self, q):
                return F.scaled_dot_product_attention(q, q, q)

        model, q = Direct(), torch.randn(3, 1, 2, 4, 8)
        expected = torch.func.vmap(model)(q)
        lpattn.apply_low_precision_attention(model, "marked", on_unsupported="fallback")
        with pytest.warns(lpattn.LpattnWarning, match="vmap"):
            torch.testing.assert_close(torch.func.vmap(model)(q), expected)

    def test_applied_in_inference_mode(self, x):
        torch._dynamo.reset()
        model = nn.Sequential(nn.MultiheadAttention(32, 4, batch_first=True)).eval()
        with torch.inference_mode():
            lpattn.apply_low_precision_attention(model, "bf16_reference")
        torch.compile(model[0], backend="aot_eager", fullgraph=True)(x, x, x)
        assert lpattn.attention_report(model)["0"].exact == {"need_weights": 1}


class TestGradients:
    def test_training_runs_exactly_with_gradients(self, model, x, marked):
        with torch.enable_grad():
            model(x).sum().backward()
            expected = model.blocks[0].attn.qkv.weight.grad.clone()
            model.zero_grad()
            lpattn.apply_low_precision_attention(model, "marked", on_unsupported="fallback")
            with pytest.warns(lpattn.LpattnWarning, match="require grad"):
                model(x).sum().backward()
        torch.testing.assert_close(model.blocks[0].attn.qkv.weight.grad, expected)
        assert not marked.calls
        assert lpattn.attention_report(model)["blocks.0.attn"].exact == {"requires_grad": 1}

    def test_training_with_a_named_backend_is_refused(self, model, x, marked):
        lpattn.apply_low_precision_attention(model, "marked")
        with torch.enable_grad(), pytest.raises(lpattn.UnsupportedCallError, match=r"torch\.no_grad"):
            model(x)


class TestOnce:
    """A backend that itself calls SDPA, as the reference does, must not be redirected into another one."""

    def test_direct_calls_inside_of_an_applied_model(self, marked, other):
        class Direct(nn.Module):
            def forward(self, q):
                return lpattn.low_precision_sdpa(q, q, q, backend="other")

        model = lpattn.apply_low_precision_attention(Direct(), "marked")
        q = torch.randn(1, 2, 4, 8)
        torch.testing.assert_close(model(q), -F.scaled_dot_product_attention(q, q, q))
        assert lpattn.attention_report(model)[""].low == {"other": 1}

    def test_compiled_blocks_inside_of_an_eager_model(self, classes, x, marked):
        torch._dynamo.reset()
        model = lpattn.apply_low_precision_attention(classes.Model().eval(), "marked")
        expected = model(x)
        for block in model.blocks:
            block.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(model(x), expected)
        assert low_calls(model) == dict.fromkeys(LAYERS, 2)


def test_a_mask_that_requires_grad_keeps_its_gradient(marked):
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.randn(1, 2, 4, 4))

        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q, self.bias)

    model, q = Biased(), torch.randn(1, 2, 4, 8)
    lpattn.apply_low_precision_attention(model, "marked", on_unsupported="fallback")
    with torch.enable_grad(), pytest.warns(lpattn.LpattnWarning, match="require grad"):
        model(q).sum().backward()
    assert model.bias.grad is not None
    assert not marked.calls


class Attend(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_sdpa_in_a_hook_of_the_models_own_module(marked):
    model, q = nn.Sequential(Attend(), Attend()), torch.randn(1, 2, 4, 8)
    model[0].register_forward_hook(lambda m, args, out: F.scaled_dot_product_attention(out, out, out))
    lpattn.apply_low_precision_attention(model, "marked")
    model(q)
    assert len(marked.calls) == 3


def test_generators_are_said_when_applied(marked):
    class Lazy(nn.Module):
        def forward(self, x):
            yield F.scaled_dot_product_attention(x, x, x)

    with pytest.warns(lpattn.LpattnWarning, match="forward of 1 is a generator or a coroutine"):
        lpattn.apply_low_precision_attention(nn.Sequential(Attend(), Lazy()), "marked")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
def test_a_fast_path_on_nested_tensors_never_falls_back_silently(marked):
    model = nn.Sequential(nn.MultiheadAttention(32, 4, batch_first=True)).eval()
    nested = torch.nested.nested_tensor([torch.randn(5, 32), torch.randn(7, 32)])
    lpattn.apply_low_precision_attention(model, "marked")
    with pytest.raises(lpattn.UnsupportedCallError, match="nested"):
        model[0](nested, nested, nested, need_weights=False)
    lpattn.apply_low_precision_attention(model, "marked", on_unsupported="fallback")
    with pytest.warns(lpattn.LpattnWarning, match="nested"):
        model[0](nested, nested, nested, need_weights=False)
    assert lpattn.attention_report(model)["0"].exact == {"nested": 1}


def test_a_wrong_dropout_is_not_ignored(marked):
    class Wrong(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, dropout_p=-0.1)

    model = lpattn.apply_low_precision_attention(Wrong(), "marked")
    with pytest.raises(lpattn.UnsupportedCallError, match=r"dropout_p -0\.1"):
        model(torch.randn(1, 2, 4, 8))


@pytest.mark.parametrize(
    "output",
    [lambda q: None, lambda q: (q, q), lambda q: q[:, :1], lambda q: q.double()],
    ids=["none", "tuple", "shape", "dtype"],
)
def test_what_a_backend_returns_is_checked(classes, output):
    class Wrong(classes.MarkedBackend):
        def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
            return output(query)

    lpattn.register_backend(Wrong("wrong", 1.0))
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(
        lpattn.BackendError, match=r"backend 'wrong' returned .*; the output of this call is \[1, 2, 4, 8\]"
    ):
        lpattn.low_precision_sdpa(q, q, q, backend="wrong")


def test_a_backend_that_is_gone_is_named_so(model, x, marked):
    lpattn.apply_low_precision_attention(model, "marked")
    lpattn.unregister_backend("marked")
    with pytest.raises(lpattn.UnsupportedCallError, match="no backend of this name is registered"):
        model(x)
    lpattn.register_backend(marked)


class Calls(nn.Module):
    """Attends after a module that does so, too."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        x = self.inner(x)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class Attends(nn.Module):
    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_a_module_of_torch_jit_counts_as_its_caller(marked):
    x = torch.randn(1, 2, 5, 8)
    traced = torch.jit.trace(Attends(), (x,))
    with pytest.raises(lpattn.InvalidArgumentError, match=r"a module of torch\.jit"):
        lpattn.apply_low_precision_attention(traced)
    model = Calls(traced)
    exact = model(x)
    lpattn.apply_low_precision_attention(model, "marked")
    with torch.no_grad():
        assert not torch.allclose(model(x), exact)
    assert lpattn.attention_report(model)[""].low == {"marked": 2}
    lpattn.remove_low_precision_attention(model)
    assert torch.equal(model(x), exact)
