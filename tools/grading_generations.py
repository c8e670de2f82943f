#!/usr/bin/env python3
"""Solutions of a small model, with boxes and #### lines, for tools/grading_agreement.py to grade in several ways.

    python tools/grading_generations.py assets/smollm2-135m-instruct GENERATIONS.jsonl --seed 0

SmolLM2-135M does not box its answers when it is asked to (0 of 60 tried), so it goes on after three worked solutions that end
in a box and, half of them, in GSM8K's own last line. The questions are reasoning-gym's. Sampled at 0.8: what is wrong, cut short or odd
is what graders differ in. One thread of transformers is enough for some hundred short solutions.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_spice.cluster.platform import STUBS  # noqa: E402
from megatron_spice.evaluation.puzzles import puzzles  # noqa: E402

TASKS = ("gsm_symbolic", "chain_sum", "products", "gcd", "simple_equations", "fraction_simplification", "polynomial_multiplication")
WORKED = """Problem: Tom has 3 boxes with 4 pens each. He gives 5 pens away. How many pens does he have left?
Solution: Tom has 3 * 4 = 12 pens. He keeps 12 - 5 = 7 pens. The answer is $\\boxed{7}$.
#### 7

Problem: Simplify the fraction $\\frac{6}{8}$.
Solution: Both are divisible by 2. The answer is $\\boxed{\\frac{3}{4}}$.

Problem: Find the value of x in the equation: 3*x + 4 = 19
Solution: 3x = 15, so x = 5. The answer is $\\boxed{x = 5}$.
#### 5

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--questions", type=int, default=20, help="of each task [%(default)s]")
    parser.add_argument("--samples", type=int, default=2, help="of each question [%(default)s]")
    parser.add_argument("--max-tokens", type=int, default=72)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    with open(options.output, "w", encoding="utf-8") as out:
        for name in TASKS:
            items = [item for item in puzzles(f"reasoning-gym/{name}", options.questions) if len(item.task.question) < 700]
            texts = generate(model, tokenizer, [item.task.question for item in items], options)
            for place, text in enumerate(texts):
                task = items[place // options.samples].task
                about = {"id": f"smollm2/{name}/{items[place // options.samples].id}/{place % options.samples}", "source": f"smollm2 {name}", "style": "boxed"}
                out.write(json.dumps({**about, "answer_type": task.answer_type, "gold": task.gold_answer, "response": text}) + "\n")
            print(f"{name}: {len(texts)} solutions", flush=True)


def load(folder: Path):  # noqa: ANN201 (transformers' own types)
    """Model and tokenizer of a Hugging Face folder, in bfloat16 on the CPU."""
    import torch

    if not torch.cuda.is_available():
        sys.path.insert(0, str(STUBS))
        import triton  # noqa: F401  transformers cannot be imported before it
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), tokenizer


def generate(model, tokenizer, questions: list[str], options: argparse.Namespace) -> list[str]:  # noqa: ANN001
    """`samples` solutions of each question, one after the other; each ends before the next problem. The worked solutions are
    computed once for all of them."""
    import torch

    worked = tokenizer(WORKED, return_tensors="pt").input_ids
    rest = [f"Problem: {question}\nSolution:" for question in questions for _ in range(options.samples)]
    batch = tokenizer(rest, return_tensors="pt", padding=True)
    ids = torch.cat([worked.expand(len(rest), -1), batch["input_ids"]], dim=1)
    mask = torch.cat([torch.ones_like(worked).expand(len(rest), -1), batch["attention_mask"]], dim=1)
    with torch.no_grad():
        cache = model(worked, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(rest))
        made = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=options.max_tokens, do_sample=True, temperature=0.8,
            top_k=0, stop_strings=["\n\n"], tokenizer=tokenizer, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    texts = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.split("\n\n")[0].strip() for text in texts]


if __name__ == "__main__":
    main()
