from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest import mock

# What other processes run too lies beside this file.
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch is imported: on a busy machine threads that wait for one another are very slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from gguf import GGMLQuantizationType, GGUFWriter  # noqa: E402
from gguf.quants import quantize  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import testbed  # noqa: E402
from cpmcu import Engine, gpu_device  # noqa: E402
from testbed import triton_without_gpu  # noqa: E402


@pytest.fixture(scope="session")
def smollm2_folder():
    return testbed.smollm2_path()


@pytest.fixture(scope="session")
def smollm2_fp32(smollm2_folder):
    return Engine.from_pretrained(smollm2_folder, dtype="float32")


@pytest.fixture
def smollm2(smollm2_fp32):
    """The shared SmolLM2 engine, with an empty cache."""
    smollm2_fp32.reset()
    return smollm2_fp32


SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    # With the usual 0.02 attention is near uniform at this width: a wrong mask would hardly show.
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ARCHITECTURES = {
    "llama": ("Llama", {}),
    "llama-gqa3": ("Llama", {"num_attention_heads": 6, "hidden_size": 96}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "minicpm4": ("MiniCPM4", {"dim_model_base": 16}),
}


def tiny_model(arch, **overrides):
    """A random transformers model, its biases and norm weights random too."""
    name, differs = ARCHITECTURES[arch]
    home = pytest.importorskip("minicpm4") if arch == "minicpm4" else transformers
    config = getattr(home, f"{name}Config")(**SHAPE | differs | overrides)
    torch.manual_seed(0)
    model = getattr(home, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """tiny_folder(arch, **config) -> (transformers model, its folder), made once per arguments."""
    made = {}

    def make(arch, **overrides):
        key = (arch, repr(sorted(overrides.items())))
        if key not in made:
            model = tiny_model(arch, **overrides)
            folder = tmp_path_factory.mktemp(arch)
            model.save_pretrained(folder)
            made[key] = model, folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def ternary_folder(tiny_folder):
    """ternary_folder(arch, target, group): a model whose layers' matrices are cut to ternary, as
    dense bfloat16 numbers, in `target`.
    """
    bitcpm = pytest.importorskip("bitcpm")

    def make(arch, target, group):
        for file in tiny_folder(arch)[1].iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        state = load_file(target / "model.safetensors")
        config = bitcpm.TernaryConfig(group_size=group)
        for name, tensor in state.items():
            state[name] = tensor.bfloat16()
            if tensor.dim() == 2 and name.startswith("model.layers."):
                codes, scales = bitcpm.quantise(tensor, config)
                state[name] = bitcpm.dequantise(codes, scales.bfloat16().float(), config).bfloat16()
        save_file(state, target / "model.safetensors", {"format": "pt"})
        return target

    return make


NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def interleave(rows, heads):
    """llama.cpp's order: rotated pairs side by side. Axis 0 is heads * [2, D / 2]."""
    shaped = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return shaped.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(model, path, arch, *, kind=GGMLQuantizationType.F32, factors=None, **extra):
    """Write a transformers model as llama.cpp's converter would."""
    config, writer = model.config, GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(model.model.layers[0].self_attn.head_dim)
    writer.add_value_length(model.model.layers[0].self_attn.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, value in extra.items():
        writer.add_key_value(f"{arch}.{key}", *value)
    for name, values in (factors or {}).items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name, tensor in state.items():
        stem, _, suffix = name.removeprefix("model.").rpartition(".")
        values = tensor.numpy()
        if stem.startswith("layers."):
            _, number, part = stem.split(".", 2)
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            if arch in ("llama", "minicpm") and (h := heads.get(part.rpartition(".")[2])):
                values = interleave(values, h)
            target = f"blk.{number}.{NAMES[part]}.{suffix}"
        else:
            target = f"{TOP[stem]}.{suffix}"
        if values.ndim == 2 and kind != GGMLQuantizationType.F32:
            writer.add_tensor(target, quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def to_gguf():
    """write_gguf, for test modules: they cannot import this one."""
    return write_gguf


@pytest.fixture(scope="session")
def interpreter():
    """Runs a check of the GPU backend in the process that has Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    with triton_without_gpu.interpreter() as run:
        yield run


@pytest.fixture(scope="session", autouse=True)
def _tests_see_no_gpu():
    """But for those that are marked gpu: what others say of backends is about this processor."""
    with mock.patch.object(gpu_device, "present", lambda: False):
        yield


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def on_gpu(request, monkeypatch):
    """Runs a check of the GPU backend: in the interpreter, and compiled if there is a GPU."""
    if request.param == "interpreter":
        return request.getfixturevalue("interpreter")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    monkeypatch.setattr(gpu_device, "present", lambda: True)
    return lambda check, *args: check("cuda", *args)
