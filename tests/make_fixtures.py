"""How tests/fixtures was made: tiny random T5s and what the `transformers` library (4.57) computes with them.

    pip install transformers==4.57.6 && python tests/make_fixtures.py

Only this script and the live tests need transformers; the tests read the files.  Each folder holds a checkpoint under its
public names (config.json, model.safetensors) and expected.safetensors: inputs, logits, layer outputs, greedy and beam-4 texts.
"""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"
MAX_NEW_TOKENS = 9

# No two widths are equal where the architecture lets them differ.
CONFIGS = {
    # As T5 v1.0 publishes it: feed_forward_proj, tie_word_embeddings, num_decoder_layers and the distance are left out.
    "relu-tied": dict(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, relative_attention_num_buckets=8),
    # As T5 v1.1 and Flan.
    "gated-untied": dict(vocab_size=36, d_model=16, d_kv=8, d_ff=20, num_layers=2, num_decoder_layers=2, num_heads=2,
                         feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                         relative_attention_num_buckets=32, relative_attention_max_distance=128),
    # heads * d_kv != d_model, as in T5-3B (wider) and v1.1-small (narrower).
    "wide-heads": dict(vocab_size=40, d_model=12, d_kv=8, d_ff=20, num_layers=2, num_decoder_layers=2, num_heads=3,
                       feed_forward_proj="relu", tie_word_embeddings=True,
                       relative_attention_num_buckets=12, relative_attention_max_distance=16),
    "deep-decoder": dict(vocab_size=36, d_model=16, d_kv=4, d_ff=20, num_layers=1, num_decoder_layers=3, num_heads=3,
                         feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                         relative_attention_num_buckets=8, relative_attention_max_distance=10),
}
BUCKETS = [(32, 128), (8, 128), (12, 16), (32, 17)]  # number of buckets, largest distance


def random_reference(config: dict, seed: int):
    """transformers' T5 with weights that all matter: matrices near gain one, norms and position tables far from their start."""
    from transformers import T5Config, T5ForConditionalGeneration
    reference = T5ForConditionalGeneration(T5Config(**config, decoder_start_token_id=0)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, p in reference.named_parameters():
        if "layer_norm" in name:
            p.data.uniform_(-1.5, 1.5, generator=generator)  # both signs, or a tied head repeats its input for ever
        elif "relative_attention_bias" in name or "shared" in name:
            p.data.normal_(std=1.0, generator=generator)
        elif ".q." in name:
            p.data.normal_(std=1.5 * (config["d_model"] * config["d_kv"]) ** -0.5, generator=generator)
        else:
            p.data.normal_(std=1.2 * p.size(1) ** -0.5, generator=generator)
    return reference


def random_inputs(config: dict, seed: int, B: int = 3, S: int = 14, T: int = 8) -> dict[str, Tensor]:
    """Row 0 is full; the others are padded on both inputs, and row 2 has a hole in its source as well."""
    draw = random.Random(seed)
    source_mask, decoder_mask = torch.ones(B, S, dtype=torch.bool), torch.ones(B, T, dtype=torch.bool)
    for row in range(1, B):
        source_mask[row, draw.randint(S // 2, S - 1) :] = False
        decoder_mask[row, draw.randint(T // 2, T - 1) :] = False
    source_mask[2:, 3] = False
    generator = torch.Generator().manual_seed(seed)
    source_ids = torch.randint(3, config["vocab_size"], (B, S), generator=generator) * source_mask
    decoder_ids = torch.randint(3, config["vocab_size"], (B, T), generator=generator) * decoder_mask
    decoder_ids[:, 0] = 0
    return dict(source_ids=source_ids, source_mask=source_mask, decoder_ids=decoder_ids, decoder_mask=decoder_mask)


def until_end(ids: Tensor, length: int) -> Tensor:
    """Texts in one form, (B, length): nothing but 0 after the end token 1."""
    ids = torch.nn.functional.pad(ids, (0, length - ids.size(1)))
    ended = (ids == 1).cumsum(1) - (ids == 1).int()
    return ids.masked_fill(ended > 0, 0)


@torch.no_grad()
def expected(reference, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers computes: its last hidden state is normed, the others are the raw residual stream."""
    source = dict(input_ids=inputs["source_ids"], attention_mask=inputs["source_mask"].long())
    out = reference(**source, decoder_input_ids=inputs["decoder_ids"], decoder_attention_mask=inputs["decoder_mask"].long(),
                    output_hidden_states=True, use_cache=False)
    # Its cache takes the number of layers from the encoder, so a deeper decoder can only run without.
    use_cache = reference.config.num_decoder_layers == reference.config.num_layers
    texts = {name: until_end(reference.generate(**source, max_new_tokens=MAX_NEW_TOKENS, num_beams=beams, do_sample=False,
                                                early_stopping=False, length_penalty=1.0, use_cache=use_cache)[:, 1:], MAX_NEW_TOKENS)
             for name, beams in (("greedy", 1), ("beam_4", 4))}
    return dict(logits=out.logits, encoder=torch.stack(out.encoder_hidden_states), decoder=torch.stack(out.decoder_hidden_states), **texts)


def varied(texts: dict[str, Tensor]) -> bool:
    """Texts that prove something: some end early, some do not, they use many tokens, and a beam finds what greed does not."""
    ended = (texts["greedy"] == 1).any(1), (texts["beam_4"] == 1).any(1)
    return (all(rows.any() and not rows.all() for rows in ended) and len(texts["greedy"].unique()) > 7
            and bool((texts["greedy"] != texts["beam_4"]).any()))


def main() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention
    for name, config in CONFIGS.items():
        folder = FIXTURES / name
        folder.mkdir(parents=True, exist_ok=True)
        for seed in range(1000):
            reference, inputs = random_reference(config, seed), random_inputs(config, seed)
            result = expected(reference, inputs)
            if varied(result):
                break
        many = random_inputs(config, seed, B=100)  # enough sources for every rule of the beam search to matter; a 0 is masked
        result |= dict(many_source_ids=many["source_ids"].to(torch.int16), many_beam_4=expected(reference, many)["beam_4"].to(torch.int16))
        weights = dict(reference.named_parameters())  # each tensor once: no embed_tokens, and no lm_head where it is tied
        if name == "relu-tied":
            stray = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
            weights[stray] = torch.randn(config["relative_attention_num_buckets"], config["num_heads"])
        save_file({key: p.detach().contiguous() for key, p in weights.items()}, folder / "model.safetensors")
        save_file({key: p.contiguous() for key, p in (inputs | result).items()}, folder / "expected.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "t5"} | config, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: seed {seed}, logits of size {result['logits'].std():.2f}", result["greedy"].tolist(), result["beam_4"].tolist(), sep="\n  ")

    distance = torch.arange(-300, 301)
    save_file({"distance": distance} | {
        f"{kind} {num} {far}": T5Attention._relative_position_bucket(distance, kind == "encoder", num, far).to(torch.int16)
        for kind in ("encoder", "decoder") for num, far in BUCKETS}, FIXTURES / "buckets.safetensors")


if __name__ == "__main__":
    main()
