"""Tiny random vision-language models, made in code, and images cut for them by hand as their processors do."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from support.models import make_tokenizer

IMAGE = "<image>"
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
TOWER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Vlm:
    """A bridge, how an image [3, height, width] becomes its inputs, and the size of image it is given in the tests."""

    bridge: Any
    inputs: Callable[[Tensor], dict[str, Tensor]]
    n_tokens: int
    height: int
    width: int
    tiles: list[tuple[int, int]] | None = None

    @property
    def image_token(self) -> int:
        return self.bridge.original_model.config.image_token_id

    def ids(self, *texts: list[int] | int) -> Tensor:
        """Token ids and images (their number of tokens) one after the other."""
        parts = [[self.image_token] * part if isinstance(part, int) else part for part in texts]
        return torch.tensor([[token for part in parts for token in part]])

    def prompt(self, image: Tensor) -> dict[str, Tensor]:
        """BOS, a token, the image, two tokens."""
        return {"input_ids": self.ids([0, 40], self.n_tokens, [41, 42]), **self.inputs(image)}


def tokenizer() -> Any:
    made = make_tokenizer()
    made.add_tokens([IMAGE], special_tokens=True)
    made.init_kwargs.update(name_or_path="", add_bos_token=True)
    return made


def bridged(model: Any, words: Any) -> Any:
    """A bridge of a model whose image encoder does not mix patches, so that each visual token shows its own alone."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    name = type(model).__name__
    model.config.architectures = [name]
    for path, weight in model.named_parameters():
        if path.endswith(("self_attn.out_proj.weight", "attn.proj.weight", "attention.o_proj.weight")):
            torch.nn.init.zeros_(weight)
        elif "mm_input_projection" in path:
            torch.nn.init.normal_(weight)
    bridge = build_bridge_from_module(model.eval(), architecture=name, hf_config=model.config, tokenizer=words)
    return bridge.eval()


def llava() -> Vlm:
    words = tokenizer()
    return Vlm(bridged(llava_model(words), words), lambda image: {"pixel_values": image[None]}, 9, 24, 24)


def llava_model(words: Any) -> Any:
    """The LLaVA as transformers has it: 24 × 24 pixels, 3 × 3 patches."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=24, patch_size=8),
        text_config=LlamaConfig(vocab_size=len(words), **TEXT),
        image_token_index=words.convert_tokens_to_ids(IMAGE),
    )
    return LlavaForConditionalGeneration(config)


def save_llava(folder: Path, chat_template: str | None = None) -> None:
    """Write the LLaVA as a Hugging Face folder, with a processor that cuts out the middle of an image."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    words = tokenizer()
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    llava_model(words).save_pretrained(folder)
    processor.save_pretrained(folder)


def gemma3() -> Vlm:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    words = tokenizer()
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**TOWER, image_size=32, patch_size=4).to_dict(),
        text_config=Gemma3TextConfig(vocab_size=len(words), head_dim=8, sliding_window=64, **TEXT).to_dict(),
        image_token_index=words.convert_tokens_to_ids(IMAGE),
        mm_tokens_per_image=16,
    )
    bridge = bridged(Gemma3ForConditionalGeneration(config), words)
    return Vlm(bridge, lambda image: {"pixel_values": image[None]}, 16, 32, 32)


def qwen2_5_vl() -> Vlm:
    """Its adapter asks for torchvision, which only the processor would use, and no processor is used here."""
    from transformer_lens.model_bridge.supported_architectures.qwen2_5_vl import Qwen2_5_VLArchitectureAdapter
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    words = tokenizer()
    tower = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    patches = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16}
    config = Qwen2_5_VLConfig(
        vision_config={**tower, **patches, "fullatt_block_indexes": [1]},
        text_config={"vocab_size": len(words), **TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        image_token_id=words.convert_tokens_to_ids(IMAGE),
        vision_start_token_id=40,
        video_token_id=43,
    )
    wanted = Qwen2_5_VLArchitectureAdapter.required_libraries
    Qwen2_5_VLArchitectureAdapter.required_libraries = []
    try:
        bridge = bridged(Qwen2_5_VLForConditionalGeneration(config), words)
    finally:
        Qwen2_5_VLArchitectureAdapter.required_libraries = wanted

    def inputs(image: Tensor) -> dict[str, Tensor]:
        frames = torch.stack([image, image])
        order = "t c (h a p) (w b q) -> (h w a b) (c t p q)"
        rows, columns = (size // 4 for size in image.shape[1:])
        patches = rearrange(frames, order, a=2, b=2, p=4, q=4)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, rows, columns]])}

    return Vlm(bridge, inputs, 15, 24, 40)


def llava_next() -> Vlm:
    """An image of 12 × 32 is doubled to 24 × 64 and padded to 32 × 64, eight tiles of 16: of 8 rows of patches 6 are left."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    words = tokenizer()
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=16, patch_size=4),
        text_config=LlamaConfig(vocab_size=len(words), **TEXT),
        image_token_index=words.convert_tokens_to_ids(IMAGE),
        image_grid_pinpoints=[[32, 64]],
    )

    def inputs(image: Tensor) -> dict[str, Tensor]:
        doubled = torch.nn.functional.interpolate(image[None], (24, 64), mode="nearest")[0]
        tiles = rearrange(torch.nn.functional.pad(doubled, (0, 0, 4, 4)), "c (i h) (j w) -> (i j) c h w", h=16, w=16)
        whole = torch.nn.functional.interpolate(image[None], (16, 16), mode="area")
        return {"pixel_values": torch.cat([whole, tiles])[None], "image_sizes": torch.tensor([[12, 32]])}

    return Vlm(bridged(LlavaNextForConditionalGeneration(config), words), inputs, 16 + 6 * 17, 12, 32)


def idefics3() -> Vlm:
    """An image of 32 × 48 is cut into 2 × 3 tiles of 16, after which comes the whole image."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

    words = tokenizer()
    config = Idefics3Config(
        vision_config=Idefics3VisionConfig(**TOWER, image_size=16, patch_size=4).to_dict(),
        text_config=LlamaConfig(vocab_size=len(words), **TEXT).to_dict(),
        image_token_id=words.convert_tokens_to_ids(IMAGE),
    )

    def inputs(image: Tensor) -> dict[str, Tensor]:
        tiles = rearrange(image, "c (i h) (j w) -> (i j) c h w", h=16, w=16)
        whole = torch.nn.functional.interpolate(image[None], (16, 16), mode="area")
        return {"pixel_values": torch.cat([tiles, whole])[None]}

    return Vlm(bridged(Idefics3ForConditionalGeneration(config), words), inputs, 7 * 4, 32, 48, [(2, 3)])


def mistral3() -> Vlm:
    """An image of any size, four patches a visual token: of 20 × 28 pixels 16 × 24 are seen."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    words = tokenizer()
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**TOWER, image_size=64, patch_size=4).to_dict(),
        text_config=MistralConfig(vocab_size=len(words), head_dim=8, **TEXT).to_dict(),
        image_token_index=words.convert_tokens_to_ids(IMAGE),
        spatial_merge_size=2,
    )
    sizes = torch.tensor([[20, 28]])
    bridge = bridged(Mistral3ForConditionalGeneration(config), words)
    return Vlm(bridge, lambda image: {"pixel_values": image[None], "image_sizes": sizes}, 6, 20, 28)


MODELS = {
    "llava": llava,
    "gemma3": gemma3,
    "qwen2_5_vl": qwen2_5_vl,
    "llava_next": llava_next,
    "idefics3": idefics3,
    "mistral3": mistral3,
}
