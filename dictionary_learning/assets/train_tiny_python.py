"""Make `tiny-python`, the language model this package ships: tokenizer, training, measurement.

    python -m dictionary_learning.assets.train_tiny_python --out FOLDER

A GPT-NeoX (the architecture of Pythia) trained on the Python standard library's own source, with the
held-out twentieth of the documents kept for validation.  Writes the tokenizer, the weights (fp16
safetensors) and `training.json`: the validation losses of the model as saved, beside a unigram and a
bigram model of the same tokenizer.

B contexts in the batch, L positions, V vocabulary.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from dictionary_learning.data import python_stdlib

EOS = "<|endoftext|>"


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, so that every string has tokens and every token stream has its string back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, unk_token=EOS, model_max_length=10**9
    )


def pack(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All documents as one row of tokens, an eos before each."""
    ids = tokenizer(documents)["input_ids"]
    eos: int = tokenizer.eos_token_id  # pyright: ignore[reportAssignmentType]
    return torch.tensor([token for document in ids for token in [eos, *document]])


def contexts(tokens: torch.Tensor, length: int, offset: int = 0) -> torch.Tensor:
    """Cut a row of tokens into (n, length + 1) contexts that overlap by one token, the target of the last position."""
    n = (len(tokens) - offset - 1) // length
    return torch.as_strided(tokens, (n, length + 1), (length, 1), storage_offset=offset)


def loss_of(model: GPTNeoXForCausalLM, batch_BL: torch.Tensor) -> torch.Tensor:
    logits_BLV = model(batch_BL[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits_BLV.float().flatten(0, 1), batch_BL[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: GPTNeoXForCausalLM, held_out: torch.Tensor, length: int) -> float:
    """Mean cross-entropy per token (nats) over every held-out context."""
    model.eval()
    batches = contexts(held_out, length).split(64)
    total = sum(loss_of(model, batch).double() * len(batch) for batch in batches)
    model.train()
    return float(total / sum(map(len, batches)))


def ngram_losses(train: torch.Tensor, held_out: torch.Tensor, vocab_size: int) -> dict[str, float]:
    """Cross-entropy per token (nats) of add-one unigrams, and of bigrams that back off to them.

    The bigram's weight between its own counts and the unigram is the Witten-Bell one, n / (n + distinct followers).
    """
    unigram = torch.bincount(train, minlength=vocab_size).double() + 1
    unigram /= unigram.sum()
    pairs = torch.bincount(train[:-1] * vocab_size + train[1:], minlength=vocab_size**2).double()
    pairs = pairs.view(vocab_size, vocab_size)
    count, followers = pairs.sum(1), (pairs > 0).double().sum(1)
    first, second = held_out[:-1], held_out[1:]
    backoff = followers[first] * unigram[second]
    bigram = (pairs[first, second] + backoff) / (count[first] + followers[first]).clamp(min=1)
    bigram = torch.where(count[first] > 0, bigram, unigram[second])
    return {"unigram": -float(unigram[second].log().mean()), "bigram": -float(bigram.log().mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-python")
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--d_model", type=int, default=192)
    parser.add_argument("--n_layers", type=int, default=4)
    parser.add_argument("--n_heads", type=int, default=6)
    parser.add_argument("--context_length", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=16, help="contexts per step")
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--max_steps", type=int, default=None, help="stop here (to try the script)")
    args = parser.parse_args()
    torch.manual_seed(0)

    train_documents = [text for _, text in python_stdlib(held_out=False)]
    held_out_documents = [text for _, text in python_stdlib(held_out=True)]
    tokenizer = train_tokenizer(train_documents, args.vocab_size)
    train, held_out = pack(train_documents, tokenizer), pack(held_out_documents, tokenizer)
    held_out_bytes = sum(len(text.encode()) for text in held_out_documents)
    print(
        f"{len(train):,} training tokens, {len(held_out):,} held out, {held_out_bytes / len(held_out):.2f} bytes each"
    )

    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.d_model,
            intermediate_size=4 * args.d_model,
            num_hidden_layers=args.n_layers,
            num_attention_heads=args.n_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=0,  # both are EOS, the first token of the vocabulary
            eos_token_id=0,
        )
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    steps = int(args.epochs * (len(train) - 1) / (args.batch_size * args.context_length))
    generator = torch.Generator().manual_seed(0)
    pending: list[torch.Tensor] = []
    started = time.time()
    bar = tqdm(range(steps), unit="step")
    for step in bar:
        if args.max_steps is not None and step >= args.max_steps:
            break
        if not pending:  # a new epoch: other context boundaries, another order
            offset = int(torch.randint(args.context_length, (1,), generator=generator))
            rows = contexts(train, args.context_length, offset)
            rows = rows[torch.randperm(len(rows), generator=generator)]
            pending = list(rows.split(args.batch_size))[::-1]
        # linear warm-up, constant, linear decay to zero over the last 40 %
        factor = min(1.0, (step + 1) / 100, (steps - step) / (0.4 * steps))
        for group in optimizer.param_groups:
            group["lr"] = factor * args.learning_rate
        loss = loss_of(model, pending.pop())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % 500 == 499:
            bar.write(f"step {step + 1}: validation {validation_loss(model, held_out, args.context_length):.4f}")

    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    saved = GPTNeoXForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    nats = {
        "model": validation_loss(saved, held_out, args.context_length),
        **ngram_losses(train, held_out, args.vocab_size),
    }
    bits_per_byte = {name: loss * len(held_out) / held_out_bytes / math.log(2) for name, loss in nats.items()}
    record = {
        "nats_per_token": nats,
        "bits_per_byte": bits_per_byte,
        "training_tokens": len(train),
        "epochs": args.epochs,
        "parameters": sum(p.numel() for p in saved.parameters()),
        "minutes": round((time.time() - started) / 60, 1),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
