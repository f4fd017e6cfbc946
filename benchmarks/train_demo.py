"""Train the demo checkpoint: a 6-million-parameter Phi-3 that has read Python's standard library.

    python benchmarks/train_demo.py --minutes 60 --output compress/demo/model

Needs torch, transformers, sentencepiece, protobuf and an interpreter with its standard library sources; no network
and no GPU. Takes `--minutes` of training on two CPU cores plus about two minutes for the tokenizer and the final
measurement. Writes the checkpoint and its card to `--output`, the held-out text beside that folder, and the figures
to `benchmarks/demo_training.json`.

The schedule is driven by the clock (warm-up, constant rate, linear decay), so the run ends in time whatever share of
the machine it gets; two runs therefore give models of the same quality, not the same bytes. Every `--save-every`
minutes a running average of the weights is published in the final layout.
"""

import argparse
import ast
import hashlib
import io
import json
import platform
import random
import sysconfig
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaTokenizerFast, Phi3Config, Phi3ForCausalLM

CONTEXT = 512
VOCABULARY = 2048  # 2000 pieces, 11 special tokens, the rest padding rows as in Phi-3
PIECES = 2000
HELDOUT_BYTES = 160_000
SUBSET_WINDOWS = 16  # the windows whose perplexity tests/test_demo_model.py recomputes
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")  # written at build time: paths of this machine
CHAT_TOKENS = (
    "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>", "<|placeholder4|>", "<|system|>",
    "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


# ---------------------------------------------------------------------------------------------------------------- text


def standard_library() -> dict[str, str]:
    """Sources of this interpreter's standard library, by relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.intersection(parts) or any(part.startswith(SKIPPED_PREFIXES) for part in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            sources["/".join(parts)] = text
    return sources


def split_heldout(sources: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Take files in the order of their path's hash until the held-out text is large enough."""
    heldout: dict[str, str] = {}
    for name in sorted(sources, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if 2_000 <= len(sources[name]) <= 40_000:
            heldout[name] = sources[name]
        if sum(map(len, heldout.values())) >= HELDOUT_BYTES:
            break
    return {name: text for name, text in sources.items() if name not in heldout}, heldout


def conversations(sources: dict[str, str]) -> list[list[dict[str, str]]]:
    """Short chats about the library's own functions, so that the chat tokens' rows are trained."""
    chats = []
    for name, source in sources.items():
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not (doc := ast.get_docstring(node)) or len(doc) > 400:
                continue
            code = ast.unparse(node)
            if len(code) > 800:
                continue
            module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            question, answer = (
                (f"Write the docstring of {module}.{node.name}.", doc)
                if len(chats) % 2
                else (f"Write the function {node.name} of the module {module}.", code)
            )
            system = [{"role": "system", "content": "You know Python's standard library."}] if len(chats) % 3 == 0 else []
            chats.append([*system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return chats


# ----------------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(sources: dict[str, str], output: Path) -> LlamaTokenizerFast:
    """A Llama-style SentencePiece model with Phi-3's special tokens, saved in slow and fast form."""
    lines = (line for source in sources.values() for line in source.split("\n") if line)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        add_dummy_prefix=False,  # learn the indentation as it is inside a file; the prefix is switched on below
        max_sentence_length=10_000,
        input_sentence_size=400_000,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    proto.normalizer_spec.add_dummy_prefix = True
    (output / "tokenizer.model").write_bytes(proto.SerializeToString())

    # legacy=True makes the converter prepend "▁" after every special token, as Phi-3's own tokenizer.json does.
    converted = LlamaTokenizerFast(vocab_file=str(output / "tokenizer.model"), legacy=True, add_prefix_space=True)
    converted.backend_tokenizer.save(str(output / "tokenizer.json"))
    tokenizer = LlamaTokenizerFast(
        tokenizer_file=str(output / "tokenizer.json"),
        vocab_file=str(output / "tokenizer.model"),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        legacy=False,
        model_max_length=CONTEXT,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    tokenizer.add_tokens([AddedToken(t, rstrip=True, normalized=False) for t in CHAT_TOKENS], special_tokens=True)
    tokenizer.save_pretrained(output)
    return LlamaTokenizerFast.from_pretrained(output)


def token_stream(sources: dict[str, str], tokenizer: LlamaTokenizerFast, seed: int) -> torch.Tensor:
    """All documents and chats in random order, each closed by <|endoftext|>."""
    texts = [text + tokenizer.eos_token for text in sources.values()]
    texts += [tokenizer.apply_chat_template(chat, tokenize=False) for chat in conversations(sources)]
    random.Random(seed).shuffle(texts)
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.from_numpy(np.concatenate([np.array(document, dtype=np.int64) for document in ids]))


# --------------------------------------------------------------------------------------------------------- measurement


def heldout_windows(text: str, tokenizer: LlamaTokenizerFast) -> torch.Tensor:
    """[windows, 512]: consecutive pieces of 511 tokens, each after <s>; the last incomplete one is dropped."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    ids = ids[: len(ids) // (CONTEXT - 1) * (CONTEXT - 1)].view(-1, CONTEXT - 1)
    return F.pad(ids, (1, 0), value=tokenizer.bos_token_id)


@torch.inference_mode()
def window_losses(model: Phi3ForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood (nats per token) of each window; every token but <s> is scored."""
    losses = []
    for batch in windows.split(8):
        logits = model(batch).logits[:, :-1].float()
        nll = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        losses.append(nll.view(len(batch), -1).mean(1))
    return torch.cat(losses)


def unigram_perplexity(stream: torch.Tensor, windows: torch.Tensor) -> float:
    """Perplexity of the training set's token frequencies (add-one smoothing) on the same scored tokens."""
    counts = torch.bincount(stream, minlength=VOCABULARY).double() + 1
    return (-(counts / counts.sum()).log()[windows[:, 1:]].mean()).exp().item()


# ------------------------------------------------------------------------------------------------------------ training


def new_model(tokenizer: LlamaTokenizerFast) -> Phi3ForCausalLM:
    ids = tokenizer.convert_tokens_to_ids
    config = Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        original_max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=ids("<s>"),
        eos_token_id=ids("<|endoftext|>"),
        pad_token_id=ids("<|endoftext|>"),
        attn_implementation="sdpa",
    )
    model = Phi3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=ids("<s>"),
        eos_token_id=[ids("<|endoftext|>"), ids("<|assistant|>"), ids("<|end|>")],
        pad_token_id=ids("<|endoftext|>"),
    )
    return model


def new_optimizers(model: Phi3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, head and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]


def learning_rate_factor(step: int, progress: float) -> float:
    """Warm-up over 30 steps, constant, then linear decay over the last 45 % of the time."""
    return min((step + 1) / 30, 1.0, max(1.0 - progress, 0.0) / 0.45)


def sample_batch(stream: torch.Tensor, rows: int, generator: torch.Generator, bos: int) -> torch.Tensor:
    """[rows, 513] from random places; seven rows of eight begin with <s>, as in the measurement."""
    starts = torch.randint(0, len(stream) - CONTEXT - 1, (rows,), generator=generator)
    batch = stream[starts[:, None] + torch.arange(CONTEXT + 1)]
    batch[torch.rand(rows, generator=generator) < 7 / 8, 0] = bos
    return batch


def train(model, stream, args, publish) -> dict[str, float]:
    """Train until the time is up; `publish(weights, figures)` is called with the average of the recent weights."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizers = new_optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    bos = model.config.bos_token_id

    start, cpu_start, saved, step = time.monotonic(), time.process_time(), time.monotonic(), 0
    while (progress := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        factor = learning_rate_factor(step, progress)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        batch = sample_batch(stream, args.batch, generator, bos)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        torch._foreach_lerp_(average, [p.detach() for p in parameters], max(0.02, 1 / step))
        if step % 10 == 0:
            elapsed = time.monotonic() - start
            rate = step * args.batch * CONTEXT / elapsed
            print(f"{elapsed / 60:6.1f} min  step {step:5d}  loss {loss.item():.3f}  rate {factor:.3f}  "
                  f"{rate:,.0f} tokens/s", flush=True)  # fmt: skip
        figures = {
            "steps": step,
            "training_tokens": step * args.batch * CONTEXT,
            "wall_seconds": round(time.monotonic() - start),
            "cpu_seconds": round(time.process_time() - cpu_start),
        }
        if time.monotonic() - saved > 60 * args.save_every:
            publish(average, figures)
            saved = time.monotonic()
    # The rate has reached zero: the last weights are the best ones.
    publish([p.detach() for p in parameters], figures)
    return figures


# ------------------------------------------------------------------------------------------------------------- writing


def publish_checkpoint(model, weights, training, stream, heldout_text, tokenizer, args) -> dict:
    """Save `weights` in bfloat16, measure what was saved in float32, and write the card and the figures."""
    copy = Phi3ForCausalLM(model.config).to(torch.bfloat16)
    copy.generation_config = model.generation_config
    with torch.no_grad():
        for parameter, weight in zip(copy.parameters(), weights, strict=True):
            parameter.copy_(weight)
    copy.save_pretrained(args.output)
    (args.output / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner only

    saved = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32).eval()
    windows = heldout_windows(heldout_text, tokenizer)
    losses = window_losses(saved, windows)
    perplexity, unigram = losses.mean().exp().item(), unigram_perplexity(stream, windows)
    figures = {
        "command": f"python benchmarks/train_demo.py --minutes {args.minutes:g} --output compress/demo/model",
        "python": platform.python_version(),
        "parameters": sum(p.numel() for p in saved.parameters()),
        "weights_bytes": (args.output / "model.safetensors").stat().st_size,
        "training_set_tokens": len(stream),
        **training,
        "heldout_bytes": len(heldout_text.encode()),
        "heldout_windows": len(windows),
        "heldout_scored_tokens": windows[:, 1:].numel(),
        "perplexity": round(perplexity, 4),
        "unigram_perplexity": round(unigram, 2),
        "unigram_ratio": round(unigram / perplexity, 2),
        "subset_windows": SUBSET_WINDOWS,
        "subset_perplexity": round(losses[:SUBSET_WINDOWS].mean().exp().item(), 4),
        "unigram_counts": torch.bincount(stream, minlength=VOCABULARY).tolist(),
    }
    args.figures.write_text(json.dumps(figures, indent=1).replace(",\n  ", ", ") + "\n", encoding="utf-8")
    (args.output / "README.md").write_text(CARD.format(**figures), encoding="utf-8")
    print(f"published: perplexity {perplexity:.3f}, unigram {unigram:.1f}, {training}", flush=True)
    return figures


CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: [code, en]
tags: [phi3, packlight, demo, test-fixture]
---

# packlight demo

A Phi-3-architecture language model of {parameters:,} parameters that has read the standard library of Python {python}.
It exists so that `packlight demo` and the tests have a real, trained checkpoint without a download: one that
compression can measurably damage. It continues Python source code plausibly; it knows nothing else.

| | |
|---|---:|
| Parameters | {parameters:,} |
| Weights (bfloat16) | {weights_bytes:,} bytes |
| **Held-out perplexity** (float32 arithmetic) | **{perplexity:.3f}** |
| Unigram model's perplexity, same tokens | {unigram_perplexity:.1f} |
| Ratio | {unigram_ratio:.1f} |
| Training tokens seen | {training_tokens:,} (training set: {training_set_tokens:,}) |
| Training time | {wall_seconds:,} s on the clock, {cpu_seconds:,} CPU seconds |

**Perplexity**: `heldout.txt` ({heldout_bytes:,} bytes, whole standard-library files that were not trained on, chosen by
the hash of their path) is tokenized once without special tokens and cut into {heldout_windows} consecutive windows of
511 tokens; each is preceded by `<s>`, which makes 512, and all of its 511 tokens are scored. The incomplete last
window is dropped: {heldout_scored_tokens:,} scored tokens. The unigram model is the frequency of each token in the
training set with add-one smoothing.

**Tokenizer**: SentencePiece BPE of 2,000 pieces with byte fallback, trained on the same sources; Phi-3's special
tokens from 2000 (`<|endoftext|>`) to 2010 (`<|user|>`), Phi-3's chat template; rows 2011 to 2047 are padding.

**Made by** `{command}`

The weights are licensed under Apache-2.0. The training sources and `heldout.txt` are parts of Python,
copyright © 2001 Python Software Foundation, all rights reserved, under the PSF License Agreement in
`LICENSE-PYTHON.txt` beside `heldout.txt`.
"""


def parse_arguments() -> argparse.Namespace:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="wall-clock limit of the training loop")
    parser.add_argument("--output", type=Path, default=here.parent / "compress" / "demo" / "model")
    parser.add_argument("--figures", type=Path, default=here / "demo_training.json")
    parser.add_argument("--save-every", type=float, default=8, metavar="MINUTES")
    parser.add_argument("--batch", type=int, default=16, help="rows of 512 tokens per step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)

    sources, heldout = split_heldout(standard_library())
    heldout_text = "\n".join(heldout.values())
    (args.output.parent / "heldout.txt").write_text(heldout_text, encoding="utf-8")
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if licence.exists():
        (args.output.parent / "LICENSE-PYTHON.txt").write_text(licence.read_text(encoding="utf-8"), encoding="utf-8")

    tokenizer = train_tokenizer(sources, args.output)
    stream = token_stream(sources, tokenizer, args.seed)
    print(f"{len(sources)} files, {len(stream):,} tokens; held out: {', '.join(heldout)}", flush=True)

    model = new_model(tokenizer)
    train(
        model, stream, args,
        lambda weights, training: publish_checkpoint(model, weights, training, stream, heldout_text, tokenizer, args),
    )  # fmt: skip


if __name__ == "__main__":
    main()
