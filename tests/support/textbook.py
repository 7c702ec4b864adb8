"""RSQ on a whole model in float64, as a textbook would write it.

The streaming tool is compared with this file, so it shares no code with it and
prefers the plain formula to the fast one. Tensors end in their axes: Outputs and
Inputs of a linear, Groups (or KV heads), Rows, Columns, B sequences, Tokens, query
Heads, K wide each, D wide residual stream. Codes and zeros are whole float64.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.textbook_solver import Quantized, gptq, propagated, rtn

Model = Any  # a Llama, Mistral, Qwen2 or Qwen3 ForCausalLM: typed in part only


def _stored(value: Tensor, storage: torch.dtype) -> Tensor:
    return value.to(storage).double()


def attention_sums(q_HTK: Tensor, k_GTK: Tensor, scaling: float) -> Tensor:
    """Attention that each token receives, summed over query heads and queries."""
    k_HTK = k_GTK.repeat_interleave(len(q_HTK) // len(k_GTK), 0)
    scores_HTT = q_HTK.double() @ k_HTK.double().mT * scaling
    future_TT = torch.ones_like(scores_HTT[0], dtype=torch.bool).triu(1)
    return scores_HTT.masked_fill(future_TT, -torch.inf).softmax(-1).sum((0, 1))


def token_weights(
    column_sums_BT: Tensor, minimum: float, maximum: float, *, exact: bool = False
) -> Tensor:
    """Importance: affine to [minimum, maximum], then mean 1, then bfloat16."""
    sums_BT = column_sums_BT.double()
    low_B1, high_B1 = sums_BT.amin(1, keepdim=True), sums_BT.amax(1, keepdim=True)
    r_BT = minimum + (maximum - minimum) * (sums_BT - low_B1) / (high_B1 - low_B1)
    r_BT = torch.where(high_B1 == low_B1, 1.0, r_BT)  # all tokens matter alike
    w_BT = r_BT / r_BT.mean(1, keepdim=True)
    return w_BT if exact else _stored(w_BT, torch.bfloat16)


def received_attention(block: Model, hidden_BTD: Tensor, call: Any) -> Tensor:
    """Column sums of all sequences, from the q and k that the block has now."""
    attention, (cos_1TK, sin_1TK) = block.self_attn, call["position_embeddings"]
    normed_BTD, heads = block.input_layernorm(hidden_BTD), []
    for project, norm in (("q_proj", "q_norm"), ("k_proj", "k_norm")):
        x_BTHK = getattr(attention, project)(normed_BTD)
        x_BTHK = x_BTHK.unflatten(-1, (-1, attention.head_dim))
        x_BHTK = getattr(attention, norm, nn.Identity())(x_BTHK).transpose(1, 2)
        first, second = x_BHTK.chunk(2, -1)
        heads.append(x_BHTK * cos_1TK + torch.cat((-second, first), -1) * sin_1TK)
    pairs = zip(*heads, strict=True)
    return torch.stack([attention_sums(q, k, attention.scaling) for q, k in pairs])


def stages(block: Model) -> list[list[Any]]:
    """Linears in the order of quantization: those of a stage share their inputs."""
    attention, mlp = block.self_attn, block.mlp
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    return [qkv, [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]


def in_float64(model: Model) -> None:
    """Make each step float64: as published, norms and eager softmax use float32."""
    model.double().eval().set_attn_implementation("sdpa")
    for module in model.modules():
        if hasattr(module, "variance_epsilon") and not module._forward_hooks:
            module.register_forward_hook(_norm_float64)


def _norm_float64(module: Any, args: tuple[Tensor], _output: Tensor) -> Any:
    mean_square = args[0].square().mean(-1, keepdim=True)
    return args[0] / (mean_square + module.variance_epsilon).sqrt() * module.weight


@torch.no_grad()
def rotate(
    model: Model,
    q_DD: Tensor | None,
    r_KK: Tensor | None,
    heads_HH: Tensor | None = None,
    mlp_II: Tensor | None = None,
) -> None:
    """Fold the gains, rotate the residual stream by ``q_DD`` and values by ``r_KK``.

    With ``heads_HH`` o's input is rotated across the heads while the model runs, and
    with ``mlp_II`` down's; their weights undo it.
    """
    in_float64(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.clone())  # its own, if they were tied
    model.config.tie_word_embeddings = False
    folds, readers, writers = [(model.model.norm, [head])], [embedding, head], []
    for block in model.model.layers:
        attention, (qkv, o, up, down) = block.self_attn, stages(block)
        folds += [(block.input_layernorm, qkv), (block.post_attention_layernorm, up)]
        readers += qkv + up
        writers += o + down
        if r_KK is not None:
            _rotate_outputs(attention.v_proj, r_KK)
            heads_OHK = attention.o_proj.weight.unflatten(1, (-1, len(r_KK)))
            attention.o_proj.weight.copy_((heads_OHK @ r_KK).flatten(1))
        if heads_HH is not None:
            width = attention.o_proj.in_features // len(heads_HH)
            whole_II = torch.kron(heads_HH.contiguous(), torch.eye(width).to(heads_HH))
            _rotate_input(attention.o_proj, whole_II)
        if mlp_II is not None:
            _rotate_input(block.mlp.down_proj, mlp_II)
    for norm, linears in folds:
        for linear in linears:
            linear.weight.mul_(norm.weight)
        norm.weight.fill_(1)
    if q_DD is not None:
        for module in readers:
            module.weight.copy_(module.weight @ q_DD)
        for linear in writers:
            _rotate_outputs(linear, q_DD)


def _rotate_input(linear: Any, q_II: Tensor) -> None:
    """Read ``x @ q`` where the model gives ``x``; the weight becomes ``W @ q``."""
    linear.weight.copy_(linear.weight @ q_II)
    linear.register_forward_pre_hook(lambda _, args: (args[0] @ q_II,))


def _rotate_outputs(linear: Any, r_KK: Tensor) -> None:
    """Each run of K outputs ``y`` becomes ``r.T @ y``: one run, or one per head."""
    runs_GKI = linear.weight.unflatten(0, (-1, len(r_KK)))
    linear.weight.copy_((r_KK.T @ runs_GKI).flatten(0, 1))
    if linear.bias is not None:
        linear.bias.copy_((linear.bias.unflatten(0, (-1, len(r_KK))) @ r_KK).flatten())


@torch.no_grad()
def quantize_model(
    model: Model,
    windows_BT: Tensor,
    *,
    method: str,
    bits: int,
    group_size: int,
    q_DD: Tensor | None = None,
    r_KK: Tensor | None = None,
    heads_HH: Tensor | None = None,
    mlp_II: Tensor | None = None,
    importance_min: float = 0.005,
    importance_max: float = 1.0,
    exact: bool = False,
    damping: float = 0.01,
    propagate: float = 0.0,
    dynamic: bool = True,
    storage: torch.dtype = torch.float32,
    **search: Any,
) -> None:
    """Replace the linears of all blocks by their decoded values, in place.

    ``quarot`` and ``rsq`` rotate first and round what stays unquantized to
    ``storage``. A block sees the outputs of the quantized blocks before it, and a
    stage those of the quantized stages before it. With ``propagate``, a copy of the
    source goes beside it and targets make up for that share of the error. Importance
    knows no sliding window, so windows must not be longer than it.
    """
    in_float64(model)
    if method in ("quarot", "rsq"):
        rotate(model, q_DD, r_KK, heads_HH, mlp_II)
        for name, parameter in model.named_parameters():
            if not name.endswith("_proj.weight"):
                parameter.copy_(_stored(parameter, storage))
    search["storage"] = storage
    whole = partial(model.model, windows_BT[:1], use_cache=False)
    calls = [kwargs for _, kwargs in _inputs(model.model.layers, whole)]
    hidden_BTD = full_BTD = model.model.embed_tokens(windows_BT)
    for block, call in zip(model.model.layers, calls, strict=True):
        weights_BT = torch.ones_like(hidden_BTD[:, :, 0])
        if method == "rsq":
            sums_BT = received_attention(block, hidden_BTD, call)
            weights_BT = token_weights(
                sums_BT, importance_min, importance_max, exact=exact
            )
        source = deepcopy(block)
        run = partial(_outputs, block, hidden_BTD, call)
        full_run = partial(_outputs, source, full_BTD, call)
        pairs = zip(stages(block), stages(source), strict=True)
        for number, (linears, full_linears) in enumerate(pairs):
            quantize: Callable[..., Quantized] = partial(rtn, **search)
            x_BTI = _input(linears[0], run)
            if method != "rtn":
                hessian_II = torch.einsum("bt,bti,btj->ij", weights_BT, x_BTI, x_BTI)
                more = {"damping": damping, "dynamic": dynamic, **search}
                quantize = partial(gptq, hessian_II=hessian_II, **more)
            residuals = None
            if number == 1:
                residuals = hidden_BTD, full_BTD
            elif number == 3:
                residuals = (
                    _input(block.post_attention_layernorm, run),
                    _input(source.post_attention_layernorm, full_run),
                )
            for linear in linears:
                target_OI = linear.weight
                if propagate:
                    target_OI = propagated(
                        linear.weight,
                        weights_BT,
                        (x_BTI, _input(full_linears[0], full_run)),
                        residuals,
                        share=propagate,
                        damping=damping,
                    )
                found = quantize(target_OI, bits=bits, group_size=group_size)
                linear.weight.copy_(found.decoded_OI)
        hidden_BTD, full_BTD = run(), full_run()


def _input(module: Any, run: Callable[[], object]) -> Tensor:
    """What a module reads during ``run()``, all sequences."""
    return torch.cat([args[0] for args, _ in _inputs([module], run)])


def _outputs(block: Model, hidden_BTD: Tensor, call: Any) -> Tensor:
    return torch.cat([block(hidden_TD[None], **call) for hidden_TD in hidden_BTD])


def _inputs(modules: Any, run: Callable[[], object]) -> list[Any]:
    """Positional and keyword arguments of each call of a module during ``run()``."""
    seen: list[Any] = []
    handles = [
        m.register_forward_pre_hook(lambda _, *now: seen.append(now), with_kwargs=True)
        for m in modules
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def perplexity(model: Model, windows_BT: Tensor) -> float:
    """Exponential of the mean loss of all tokens but the first of each window."""
    in_float64(model)
    losses = []
    for window_T in windows_BT:
        logits_TV = model(window_T[None], use_cache=False).logits[0]
        losses.append(nn.functional.cross_entropy(logits_TV[:-1], window_T[1:]))
    return float(torch.stack(losses).mean().exp())
