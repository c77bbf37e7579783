"""What a user has: words for a concept, prompts, functions of images, and settings at the smallest size."""

CONCEPT = ["--concept", "gogh", "--anchor", "art", "--preserve", "monet"]
KINDS = {
    "explicit": ["by gogh", "a gogh"],
    "neighbour": ["by monet", "a monet"],
    "benign": ["a cat", "a dog"],
    "train": ["a hat", "a bus", "a cup"],
}
MINE = """
def redness(images, prompts):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


def swirls(images, prompts):
    return images[:, 2].mean(dim=(1, 2))
"""
SETTINGS = ["--settings", "mine.yaml", "--measure", "mine.py:swirls", "--reward", "mine.py:redness"]
YAML = """
prompts_file: prompts.json
size: 32
prompts_per_kind: 2
evaluation_steps: 2
eraser: {regularization: 1e-1}
"""
RECOVERY = """
iterations: 2
learning_rate: 1e-2
lora: {rank: 2, alpha: 2}
refl:
  {batch_size: 2, micro_batch_size: 2, steps: 3, first_reward_step: 2, last_reward_step: 2,
   pretraining_batch_size: 2, erasure_batch_size: 2, evaluate_every: 1}
run: {schedule: cosine, checkpoint_every: 1}
"""
