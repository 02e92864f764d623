"""LoRA on a body that has been trained: what a run adds to it, leaves alone, and merges at its end.

The body is the first flow: its decoder, its tables and its projection, and the codebook. Its new
parts, which no pretrained model brings along, are the embedding of observed tokens of a
`conditional` model, and all flows above.
"""

from importlib.util import find_spec

from transformers import PreTrainedModel

from ..baseline import flows_of
from .config import TrainingConfig


def add_lora(model: PreTrainedModel, config: TrainingConfig) -> None:
    """Gives the linear maps of the first flow's decoder low-rank additions, in place.

    A map W becomes W + (lora_alpha / lora_rank) B A, where B starts as 0: the model stays what it
    was (Hu et al., *LoRA*, ICLR 2022, arXiv:2106.09685). Nothing happens if `lora_rank` is 0.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If the model is a discrete one, or has none of the `lora_targets`.
    """
    if not config.lora_rank:
        return

    flows = flows_of(model)
    if not flows:
        raise ValueError(
            "lora_rank must be 0 for a discrete model: adapters are for a flow's body."
        )
    if find_spec("peft") is None:
        raise ImportError(
            f'lora_rank={config.lora_rank} needs PEFT: pip install "tarflow_hf[peft]", or leave lora_rank out to train '
            "the whole body."
        )

    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=config.lora_targets or "all-linear",
    )
    inject_adapter_in_model(lora, flows[0].decoder)


def merge_lora(model: PreTrainedModel) -> None:
    """Adds what LoRA has learnt to the maps that it was added to, and takes the adapters off."""
    if find_spec("peft") is None or not flows_of(model):
        return

    from peft.tuners.tuners_utils import BaseTunerLayer

    decoder = flows_of(model)[0].decoder
    adapted = {
        path: part for path, part in decoder.named_modules() if isinstance(part, BaseTunerLayer)
    }
    for path, part in adapted.items():
        part.merge()
        parent, _, name = path.rpartition(".")
        setattr(decoder.get_submodule(parent), name, part.get_base_layer())

    if adapted:
        del decoder.peft_config


def frozen_parameters(model: PreTrainedModel, config: TrainingConfig) -> frozenset[str]:
    """The names of the parameters that no stage of a run trains.

    With `lora_rank` they are the body but for its adapters and its new parts; with
    `freeze_codebook` the codebook.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = []
    if config.freeze_codebook or config.lora_rank:
        frozen += [name for name in names if name.startswith("flow.codebook.")]

    if config.lora_rank:
        body = (name for name in names if name.startswith("flow.layers.0."))
        frozen += [n for n in body if ".lora_" not in n and ".observed_embedding." not in n]

    return frozenset(frozen)
