from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import testbed  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from cpmcu import Engine  # noqa: E402


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
