"""A prompt made up for tests that look at few of its parts."""

from rft_cluster.data.images import image_sha256
from rft_cluster.messages import Example, ImageRef, Prompt


def some_prompt(
    prompt_id: str = "train/0/0",
    image_id: str = "photos/a.png",
    image: bytes = b"an image",
    text: str = "Which flower?",
    label: str = "rose",
    seed: int = 0,
    aliases: tuple[str, ...] = (),
) -> Prompt:
    return Prompt(prompt_id, Example(ImageRef(image_id, image_sha256(image)), label, aliases), text, seed)
