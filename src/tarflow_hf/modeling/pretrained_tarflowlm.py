"""The model's side of the library: its parts, their initialisation, and how it loads."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .causality import check_decoders
from .codebook import Codebook, Gaussians
from .configuration_tarflowlm import TarFlowLMConfig, round_up
from .decoder_tarflowlm import NO_TABLE, InputEmbedding
from .evaluation_noise import drew_one_seed
from .slots_tarflowlm import make_layout
from .vocabulary_tarflowlm import add_tokens


def _first_eight(names: Iterable) -> str:
    """The first eight of some names, and how many more there are."""
    names = sorted(map(str, names))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{names[:8]}{more}"


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

    _state_before_evaluation: Tensor | None = None  # of the global generator, until its loop begins

    def __init__(self, config: TarFlowLMConfig, *inputs, **kwargs):
        super().__init__(config, *inputs, **kwargs)
        config.validate()

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
            ValueError: If weights are missing, left over, or of another shape (they are named), if
                the configuration is that of another architecture, or a JSON file is no such thing.
        """
        try:
            model, info = super().from_pretrained(
                *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except RecursionError:
            raise ValueError(
                f"A JSON file of the checkpoint {args[0] if args else ''} is nested too deeply: it is damaged, or no "
                "checkpoint of a model."
            ) from None

        model.check_decoders()
        if output_loading_info:
            return model, info

        kinds = ["missing_keys", "unexpected_keys"]
        if not ignore_mismatched_sizes:
            kinds.append("mismatched_keys")

        faults = [f"{kind} {_first_eight(info[kind])}" for kind in kinds if info[kind]]
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

    def check_decoders(self) -> None:
        """Raises a ValueError if a decoder of a flow looks ahead, or cannot be run slot by slot."""
        decoders = [layer.decoder for layer in self.flow.layers]
        check_decoders(decoders, self.config.max_position_embeddings // self.config.patch_size)

    def train(self, mode: bool = True) -> "TarFlowLMPreTrainedModel":
        """Switches between training and evaluation.

        An evaluation leaves the random numbers of training unchanged: the seed that its loop over a
        `DataLoader` draws, between `model.eval()` and the first batch, is taken back. It is told by
        its size, so that one seed drawn by hand in that place is taken back too.
        """
        self._state_before_evaluation = None if mode else torch.get_rng_state()
        return super().train(mode)

    def _leave_no_trace(self) -> None:
        """Takes back the seed that the loop of an evaluation drew, at its first batch."""
        state = self._state_before_evaluation
        if state is None or torch.compiler.is_compiling():
            return

        if drew_one_seed(state):
            torch.set_rng_state(state)

        self._state_before_evaluation = None

    def _zero_of_unused(self) -> Tensor:
        """0, with the parameters that only observed tokens use: DDP wants all in every step."""
        embeddings = (layer.observed_embedding for layer in self.flow.layers)
        return 0.0 * sum(p.sum() for embedding in embeddings for p in embedding.parameters())

    def _logits_maker(
        self,
        latents: Tensor,
        codebook: Gaussians,
        num_flows: int | None,
        attention_mask: Tensor | None = None,
    ) -> Callable[[], Tensor] | None:
        """Returns a function that computes the log-weights (B, T, V) of each next token, if any."""
        if len(self.flow.layers[:num_flows]) > 1 or not self.config.has_token_logits:
            return None

        layer = self.flow.layers[0]

        def make_logits() -> Tensor:
            order = layer.order(latents, make_layout(latents, 1, attention_mask))
            slots = F.pad(order.arrange(latents), (0, 0, 0, 1))  # the last one is not read
            context = layer.context(layer.inputs(slots, codebook))
            ((weight, bias),) = layer.head.projection()
            return order.from_slots(F.linear(context[:, 1:], weight, bias))

        return make_logits

    def get_input_embeddings(self) -> InputEmbedding:
        """The way into the first decoder; its `weight` (V, d) are the means of the tokens' latents."""
        embedding = self.flow.layers[0].input_embedding
        embedding.codebook = [self.codebook]
        return embedding

    def get_submodule(self, target: str) -> nn.Module:
        """The module of a name, as in torch.

        Raises:
            AttributeError: If there is none. PEFT takes a parameter with a row for each token for
                the table that a prompt needs; then the message says that there is no table.
        """
        try:
            return super().get_submodule(target)
        except AttributeError as error:
            if target in dict(self.named_parameters()):
                raise AttributeError(
                    f"{target} is a parameter. {NO_TABLE} Take LoRA of linear maps."
                ) from error

            raise

    def enable_input_require_grads(self) -> None:
        """Has no work to do: gradients reach the flows through their own inputs."""

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Codebook:
        """Adds tokens to the vocabulary: codebook entries far from all others, and rows of tables.

        Every old token's likelihood stays as it was but for the new tokens' share. A new row of a
        table is the mean of the old ones, and so a new token begins as likely as an average one; in
        a stack with flows above the first, e^12 times less likely, so that these see the same.

        Args:
            new_num_tokens: The new size of the vocabulary. None changes nothing.
            pad_to_multiple_of: Rounds the new size up.
            mean_resizing: True, as in the library; there is no other way.

        Returns:
            The codebook.

        Raises:
            ValueError: If the vocabulary would shrink, or `mean_resizing` is False.
        """
        vocab_size = self.config.vocab_size
        num_tokens = vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            num_tokens = round_up(num_tokens, pad_to_multiple_of)

        if not mean_resizing:
            raise ValueError("mean_resizing must be True: new rows are the mean of the old ones.")
        if num_tokens < vocab_size:
            raise ValueError(
                f"The vocabulary has {vocab_size} tokens and cannot shrink to {num_tokens}: the flows give each of "
                "its tokens a share of the probability."
            )

        if num_tokens > vocab_size:
            add_tokens(self, num_tokens - vocab_size)

        return self.codebook
