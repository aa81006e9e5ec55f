"""The warm start of the tiny model: training on unlabelled images, before any reward."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from rft_cluster.model.patch_embed import multiply_patches
from rft_cluster.model.tiny.look_alike import Looks, look_alike_groups
from rft_cluster.prompts import Question, asks_for_thinking

BATCH = 64
LEARNING_RATE = 3e-3
SWAPPED = 0.25  # share of completions whose think words in the input are another image's
FAVOUR = 0.3  # nats by which the first name leads: more than BF16's rounding of a logit, too little to bias exploration


@dataclass
class _Draw:
    images: torch.Tensor  # [B, 3, H, W], values 0 to 255
    thoughts: list[str]  # B
    seen: torch.Tensor  # [B, D], of unit spread: places on the map of the pool, and what the images look like


class Pool:
    """The unlabelled images, resized like the processor does, in one stack for each size: a batch has one size."""

    def __init__(self, images: Sequence[Image.Image], classes: int, pixels: int, side: int, seed: int) -> None:
        """`pixels`: of every image after resizing. `side`: pixels of an image token's side."""
        members: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            size = smart_resize(image.height, image.width, side, min_pixels=pixels, max_pixels=pixels)
            members.setdefault(size, []).append(index)
        self._members = [np.array(indices) for indices in members.values()]
        self._stacks = [
            torch.stack([_as_tensor(images[i].resize((width, height), Image.Resampling.BICUBIC)) for i in indices])
            for (height, width), indices in members.items()
        ]
        self._looks = Looks(self._stacks, seed)
        order = np.argsort(np.concatenate(self._members))
        looks = self._looks.pool[order]
        places, self.words = look_alike_groups(looks.numpy(), classes, seed)
        self._places = torch.from_numpy(places).float()
        self.values = places.shape[1] + looks.shape[1]  # D

    def draw(self, rng: np.random.Generator, size: int) -> _Draw:
        """Draw `size` images of one shape, slightly shifted, turned and zoomed, so that new images are recognised."""
        share = np.array([len(indices) for indices in self._members])
        bucket = rng.choice(len(share), p=share / share.sum())
        chosen = rng.integers(share[bucket], size=size)
        stack = self._stacks[bucket][chosen].float()
        shift, zoom = rng.uniform(-0.08, 0.08, (size, 2)), rng.uniform(0.92, 1.08, (size, 2))
        turn = rng.uniform(-0.15, 0.15, size)
        rows = np.stack(
            [
                np.stack([zoom[:, 0] * np.cos(turn), -np.sin(turn), 2 * shift[:, 0]], 1),
                np.stack([np.sin(turn), zoom[:, 1] * np.cos(turn), 2 * shift[:, 1]], 1),
            ],
            1,
        )
        grid = F.affine_grid(torch.from_numpy(rows).float(), list(stack.shape), align_corners=False)
        moved = F.grid_sample(stack, grid, padding_mode="border", align_corners=False)
        indices = self._members[bucket][chosen]
        seen = torch.cat([self._places[torch.from_numpy(indices)], self._looks(moved)], 1)
        return _Draw(moved, [" ".join(self.words[i]) for i in indices], seen)


def _as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def warm_start(
    model: Any,
    processor: Any,
    pool: Pool,
    class_names: Sequence[str],
    question: Question,
    steps: int,
    report: Callable[[str], None],
) -> None:
    """Train the model in place on the pool: the format, the look-alike words, and an answer independent of the image.

    Every completion has 8 tokens: `<think>`, two words, `</think>`, `<answer>`, the name, `</answer>`, end. If the
    prompt asks for the answer only, it has the last 4 of them. Shapes below: B images, L completion tokens,
    V vocabulary, D values of what is seen.
    """
    thinks = asks_for_thinking(question.text)
    length = 8 if thinks else 4  # L
    at_answer = length - 3  # index of the name among the L tokens
    torch.set_flush_denormal(True)  # denormal floats slow a tiny model's training tenfold on CPUs
    tokenizer = processor.tokenizer
    answer = _name_distribution(tokenizer, class_names)  # [V]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}],
        add_generation_prompt=True,
    )
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    heads = torch.nn.ModuleList(torch.nn.Linear(model.config.text_config.hidden_size, pool.values) for _ in range(2))
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], weight_decay=0.01)
    model.train()
    multiply_patches(model)
    from_tower: list[torch.Tensor] = []  # [image tokens of all images, width]: the model's output does not have them
    watching = model.model.visual.register_forward_hook(lambda tower, given, out: from_tower.append(out.pooler_output))
    for step in _timed(steps, report):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 20) * (1 - step / steps)
        drawn = pool.draw(rng, BATCH)
        written = _completions(drawn.thoughts if thinks else None, rng.choice(class_names, BATCH).tolist())
        texts = [asked + text for asked, text in zip(_prompts(prompt, question, rng), written, strict=True)]
        batch = _encoded(processor, texts, drawn.images, model.config.image_token_id)
        target = batch["input_ids"][:, -length:].clone()  # [B, L]
        # Swap some think words for another image's in the input, but not in the target: the next token must follow
        # from image and position, even after words that come from exploration.
        _swap(batch["input_ids"], (-7, -6) if thinks else (), rng)
        # The state before each completion token predicts it.
        hidden = model.model(**batch).last_hidden_state[:, -length - 1 : -1]  # [B, L, width]
        log_probs = torch.log_softmax(model.lm_head(hidden), -1)  # [B, L, V]
        spelled = _cross_entropy(log_probs, target, answer, at_answer)  # [B, L]
        # The state before the answer must know what is seen in the image, which GRPO can then tie to a name. So must
        # the image's own tokens: then the tower learns sooner (a linear probe of clothes: 67.8 % in place of 65.4 %).
        by_tower = from_tower.pop().unflatten(0, (BATCH, -1)).mean(1)  # [B, width]
        seen = [head(states) for head, states in zip(heads, (hidden[:, at_answer], by_tower), strict=True)]
        loss = spelled.mean() + sum(F.mse_loss(one, drawn.seen) for one in seen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    watching.remove()
    model.eval()


def _completions(thoughts: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    thinking = [""] * len(names) if thoughts is None else [f"<think>{thought}</think>" for thought in thoughts]
    return [f"{think}<answer>{name}</answer><|im_end|>" for think, name in zip(thinking, names, strict=True)]


def _encoded(processor: Any, texts: list[str], images: torch.Tensor, image_token: int) -> Any:
    """A batch as the model takes it."""
    # Mark the image tokens here: the processor's own way would take a third of the whole time.
    quick: Any = {"return_tensors": "pt", "text_kwargs": {"return_mm_token_type_ids": False}}
    batch = processor(text=texts, images=list(images), **quick)
    batch["mm_token_type_ids"] = (batch["input_ids"] == image_token).long()
    return batch


def _prompts(prompt: str, question: Question, rng: np.random.Generator) -> list[str]:
    """A batch of a prompt. If the question lists the classes, each does so in another order, so that the completion
    comes not to depend on it."""
    if question.template is None:
        return [prompt] * BATCH
    orders = (rng.permutation(len(question.classes)) for _ in range(BATCH))
    listings = (question.listing([question.classes[place] for place in order]) for order in orders)
    return [prompt.replace(question.text, listing) for listing in listings]


def _name_distribution(tokenizer: PreTrainedTokenizerFast, class_names: Sequence[str]) -> torch.Tensor:
    """The fixed distribution [V] of the answer's name over the vocabulary: the first class is favoured."""
    names = torch.tensor([_one_token(tokenizer, name) for name in class_names])
    favoured = torch.zeros(len(tokenizer)).scatter(0, names, 1.0)
    favoured[names[0]] = np.exp(FAVOUR)
    return favoured / favoured.sum()


def _swap(input_ids: torch.Tensor, columns: Sequence[int], rng: np.random.Generator) -> None:
    """Swap these columns' tokens for another row's, in place, in a share `SWAPPED` of the rows [B, tokens]."""
    swapped = torch.from_numpy(rng.random(len(input_ids)) < SWAPPED)
    for column in columns:
        other = input_ids[torch.from_numpy(rng.permutation(len(input_ids))), column]
        input_ids[swapped, column] = other[swapped]


def _cross_entropy(log_probs: torch.Tensor, target: torch.Tensor, answer: torch.Tensor, at_answer: int) -> torch.Tensor:
    """Cross-entropy [B, L] of `log_probs` [B, L, V] with the tokens `target` [B, L]."""
    spelled = -log_probs.gather(-1, target[..., None])[..., 0]  # [B, L]
    # At the name, the target is the distribution `answer` [V], not the drawn name: less noise for the same optimum.
    named = -(log_probs[:, at_answer] * answer).sum(-1, keepdim=True)  # [B, 1]
    return torch.cat([spelled[:, :at_answer], named, spelled[:, at_answer + 1 :]], 1)


def _one_token(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    (token,) = tokenizer.encode(text)  # one token: `check_conditions` makes sure
    return token


def _timed(steps: int, report: Callable[[str], None]) -> Iterator[int]:
    """Yield the step numbers. Report speed and time left about every five seconds."""
    started = last = time.monotonic()
    for step in range(steps):
        yield step
        now = time.monotonic()
        if now - last > 5:
            speed, last = (step + 1) / (now - started), now
            left = (steps - step - 1) / speed
            report(f"tiny model: warm start {step + 1}/{steps}, {speed:.1f} steps/s, {left:.0f} s left")
