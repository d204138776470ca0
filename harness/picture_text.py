"""A small text encoder that reads pictures: Qwen-Image's, of ComfyUI's own tokenizer, language and vision networks."""

from typing import Any

import comfy.sd
import torch
from comfy import sd1_clip
from comfy.supported_models_base import ClipTarget
from comfy.text_encoders.llama import Llama2_, Qwen25_7BVLI, Qwen25_7BVLI_Config
from comfy.text_encoders.qwen_image import QwenImageTEModel, QwenImageTokenizer
from comfy.text_encoders.qwen_vl import Qwen2VLVisionTransformer

from harness.tiny import seed_weights


def picture_clip(width: int = 16) -> Any:
    """A CLIP whose texts are ``width`` wide and have read the pictures that they are tokenized with."""

    class Network(Qwen25_7BVLI):
        def __init__(self, config_dict: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
            torch.nn.Module.__init__(self)
            config = Qwen25_7BVLI_Config(
                hidden_size=width,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=1,
                num_key_value_heads=1,
            )
            place = {"device": device, "dtype": dtype, "ops": operations}
            self.num_layers = config.num_hidden_layers
            self.model = Llama2_(config, **place)
            self.visual = Qwen2VLVisionTransformer(
                hidden_size=16, output_hidden_size=width, intermediate_size=32, num_heads=1, num_layers=1, **place
            )
            self.dtype = dtype

    class Encoder(sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(
                device=device,
                layer="last",
                textmodel_json_config={},
                dtype=dtype,
                special_tokens={"pad": 151643},
                layer_norm_hidden_state=False,
                model_class=Network,
                enable_attention_masks=True,
                return_attention_masks=True,
                model_options=model_options or {},
            )

    class Model(QwenImageTEModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            sd1_clip.SD1ClipModel.__init__(
                self,
                device=device,
                dtype=dtype,
                name="qwen25_7b",
                clip_model=Encoder,
                model_options=model_options or {},
            )

    clip = comfy.sd.CLIP(ClipTarget(QwenImageTokenizer, Model), model_options={"dtype": torch.float32})
    seed_weights(clip.cond_stage_model, "picture clip", width)
    return clip
