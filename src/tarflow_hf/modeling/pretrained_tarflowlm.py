"""The model's side of the library: its parts, their initialisation, and how it loads."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .codebook import Codebook
from .configuration_tarflowlm import TarFlowLMConfig


class TarFlowLMPreTrainedModel(PreTrainedModel):
    """Base of the model. Modules with weights of their own have a method `init_weights(std)`."""

    config_class = TarFlowLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # Trainer counts the labels of all batches of a step, and `forward` divides by them.
    accepts_loss_kwargs = True
    _no_split_modules = ["FlowLayer"]
    _keep_in_fp32_modules_strict = ["codebook"]  # its scales are far finer than bfloat16's steps
    # Only where the config says so (`tie_word_embeddings`).
    _tied_weights_keys = {"flow.layers.0.head.projection.weight": "flow.layers.0.embedding"}
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(
        cls,
        *args,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        """Loads as the library does, but a checkpoint that does not fit is an error, no warning.

        With `output_loading_info` the caller gets the library's report, and judges.

        Raises:
            ValueError: If weights are missing, left over, or of another shape; they are named.
        """
        model, info = super().from_pretrained(
            *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        model.check_decoders()
        if output_loading_info:
            return model, info

        kinds = ["missing_keys", "unexpected_keys"]
        if not ignore_mismatched_sizes:
            kinds.append("mismatched_keys")

        faults = [f"{kind} {sorted(map(str, info[kind]))}" for kind in kinds if info[kind]]
        if faults:
            raise ValueError(
                f"The checkpoint {args[0] if args else ''} does not fit the model: {'; '.join(faults)}."
            )

        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Codebook):
            init.normal_(module.mean)
            init.constant_(module.log_scale, self.config.initial_log_scale)
        elif hasattr(module, "init_weights") and not isinstance(module, PreTrainedModel):
            module.init_weights(self.config.initializer_range)
