"""The library's server, OpenAI's interface, for one checkpoint.

    python -m tarflow_hf.serve CHECKPOINT --port 8765

This is `transformers serve` with what it needs for a model that is not in the library: the class, a
generator of its own for each request with a seed, gaps (`suffix`) where the model is conditional,
and a status of 400 for what a request asks wrongly. It needs `pip install "tarflow_hf[serve]"`.

    curl localhost:8765/v1/completions -H "Content-Type: application/json" \
        -d '{"model": "CHECKPOINT", "prompt": "the function ", "max_tokens": 32, "seed": 0}'
"""

import argparse
from functools import partial
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import BaseHandler, GenerateManager, GenerationState

from .data import checked_ids, continued_ids, token_ids
from .loading import check_checkpoint
from .modeling.generation_checks import check_options
from .modeling.generation_options import GenerationOptions
from .modeling.modeling_tarflowlm import TarFlowLMModel


class ServedModel(TarFlowLMModel):
    """The model, whose requests bring their seed in their config."""

    def generate(self, inputs: Tensor | None = None, generation_config=None, **options: Any):
        seed = getattr(generation_config, "_seed", None)
        if seed is not None:
            options["generator"] = torch.Generator().manual_seed(seed)

        return super().generate(inputs, generation_config, **options)


class OneModel(ModelManager):
    """Loads the checkpoint that is served, and no other."""

    def _load_model(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> ServedModel:
        return (
            ServedModel.from_pretrained(self.force_model, dtype=self.dtype).eval().to(self.device)
        )

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name, without a revision: it is the only one."""
        return model_id

    def _load_processor(self, *args: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.force_model)

    def get_gen_models(self) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": ""}]


# Options of OpenAI's interface that are not served, and their values that ask for nothing.
NOT_SERVED: dict[str, tuple] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "previous_response_id": (),
    "background": (False,),
}


class _Checked(BaseHandler):
    """A handler that refuses what the model cannot do before any work begins."""

    async def handle_request(self, body: dict[str, Any], request_id: str):
        for name, neutral in NOT_SERVED.items():
            value = body.get(name)
            if value is not None and value not in neutral:
                raise HTTPException(400, f"{name} is not served: leave out {value!r}.")

        seed = body.get("seed")
        if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
            raise HTTPException(400, f"seed must be an integer in 0, ..., 2^63 - 1, not {seed!r}.")

        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            value = body.get(name)
            if value is not None and not (type(value) is int and value >= 1):
                raise HTTPException(400, f"{name} must be an integer of at least 1, not {value!r}.")

        stop = body.get("stop")
        stops = stop if isinstance(stop, list) else [stop or ""]
        if not all(isinstance(each, str) for each in stops):
            raise HTTPException(400, f"stop must be a string or a list of strings, not {stop!r}.")

        try:
            return await super().handle_request(body, request_id)
        except (FloatingPointError, ValueError) as error:  # what `generate` refuses
            raise HTTPException(400, str(error)) from error

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        try:
            options = {**body, "seed": None}  # not the generator that all requests share
            config = super()._build_generation_config(options, model_generation_config, use_cb)
            if bias := body.get("logit_bias"):
                config.sequence_bias = {(int(token),): float(x) for token, x in bias.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise HTTPException(400, f"The options of the request: {error}") from error

        config.return_dict_in_generate = False  # the server wants tokens, and nothing besides
        for name in [name for name in vars(config) if name.startswith("output_")]:
            setattr(config, name, None)

        config._seed = body.get("seed")
        if config.temperature == 0:  # the mode of the noise, as do_sample=False says already
            config.temperature = 1.0

        return config

    def prepare(
        self, model: ServedModel, inputs: dict[str, Tensor], config: GenerationConfig
    ) -> None:
        """Makes the ids integers, and the number of new tokens one that the model has room for."""
        inputs["input_ids"] = inputs["input_ids"].long()  # an empty prompt comes as numbers
        patch_size = model.config.patch_size
        room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
        num_new = min(config.max_new_tokens or room, room)
        config.max_new_tokens = num_new - num_new % patch_size or patch_size

    def check(
        self,
        model: ServedModel,
        tokenizer: PreTrainedTokenizerBase,
        inputs: dict[str, Tensor],
        config: GenerationConfig,
    ) -> None:
        """Raises an HTTPException of status 400 unless the request can be answered."""
        length = inputs["input_ids"].shape[1]
        longest = model.config.max_position_embeddings
        if length >= longest:
            raise HTTPException(
                400,
                f"The prompt has {length} tokens, the model takes fewer than {longest}: shorten it.",
            )

        patch_size = model.config.patch_size
        if length % patch_size:
            raise HTTPException(
                400, f"The prompt must be a multiple of {patch_size} tokens, not {length}."
            )

        try:
            given = {"tokenizer": tokenizer}
            options = GenerationOptions.resolve(given, config, model.generation_config)
            check_options(options, model)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error


class Completions(_Checked, CompletionHandler):
    """`/v1/completions`."""

    def _build_generation_config(
        self, body: dict[str, Any], *args: Any, **kwargs: Any
    ) -> GenerationConfig:
        config = super()._build_generation_config(body, *args, **kwargs)
        config._prompt = body.get("prompt", "")
        return config

    def _inputs(
        self, model: ServedModel, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig
    ) -> dict[str, Tensor]:
        """The prompt's tokens as training makes them; the library's have special tokens around."""
        is_blank = not config._prompt.strip()
        read = token_ids if is_blank else partial(checked_ids, name="the prompt")
        ids = read(tokenizer, config._prompt)
        return {"input_ids": torch.tensor([ids], dtype=torch.long, device=model.device)}

    def _streaming(
        self, request_id, model, processor, model_id, inputs, config, manager, suffix=None
    ):
        if suffix:
            raise HTTPException(400, "The gap before a suffix is filled at once: leave out stream.")

        inputs = self._inputs(model, processor, config)
        self.prepare(model, inputs, config)
        self.check(model, processor, inputs, config)
        arguments = request_id, model, processor, model_id, inputs, config, manager
        return super()._streaming(*arguments)

    async def _non_streaming(
        self, request_id, model, processor, model_id, inputs, config, manager, suffix=None
    ):
        if suffix:
            manager = Gap(manager, suffix)

        inputs = self._inputs(model, processor, config)
        self.prepare(model, inputs, config)
        self.check(model, processor, inputs, config)
        arguments = request_id, model, processor, model_id, inputs, config, manager
        return await super()._non_streaming(*arguments)


class Gap:
    """Fills the gap between a prompt and a suffix, in a manager's thread."""

    def __init__(self, manager: GenerateManager, suffix: str):
        self.manager, self.suffix = manager, suffix

    async def generate_non_streaming(
        self, model: ServedModel, processor, inputs, config: GenerationConfig, request_id: str
    ) -> tuple[str, int, Tensor]:
        if not model.config.conditional:
            raise HTTPException(
                400, "suffix needs a model that is conditional: this one continues prompts only."
            )

        prompt = inputs["input_ids"]
        suffix = prompt.new_tensor([continued_ids(processor, self.suffix)])
        longest = model.config.max_position_embeddings
        room = longest - prompt.shape[1] - suffix.shape[1]
        num_new = min(config.max_new_tokens, room)
        if num_new < 1:
            raise HTTPException(
                400, f"No room between prompt and suffix: the model takes {longest} tokens."
            )

        ids = torch.cat([prompt, prompt.new_zeros(1, num_new), suffix], 1)
        place = torch.arange(ids.shape[1], device=ids.device)
        is_gap = (place >= prompt.shape[1]) & (place < prompt.shape[1] + num_new)
        config.max_new_tokens = None
        try:
            sequences = await self.manager.async_submit(
                model.generate, ids, config, infill_mask=is_gap[None], tokenizer=processor
            )
        except ValueError as error:
            raise HTTPException(400, str(error)) from error

        filled = sequences[0, is_gap]
        return processor.decode(filled, skip_special_tokens=True), prompt.shape[1], filled


class _Templated(_Checked):
    """A handler of chats: it needs a template."""

    async def handle_request(self, body: dict[str, Any], request_id: str):
        _, _, tokenizer = self._resolve_model(dict(body))
        if tokenizer.chat_template is None:
            raise HTTPException(
                400,
                "The tokenizer has no chat template: this is a base model, see /v1/completions.",
            )

        return await super().handle_request(body, request_id)


class Chats(_Templated, ChatCompletionHandler):
    """`/v1/chat/completions`, where the tokenizer has a template."""

    async def handle_request(self, body: dict[str, Any], request_id: str):
        messages = body.get("messages")
        are_messages = isinstance(messages, list) and all(
            isinstance(message, dict) and isinstance(message.get("role"), str)
            for message in messages
        )
        if not messages or not are_messages:
            raise HTTPException(400, "messages must be a list of objects with a role and content.")

        return await super().handle_request(body, request_id)

    def _streaming(self, request_id, model, processor, model_id, inputs, config, **options):
        self.prepare(model, inputs, config)
        self.check(model, processor, inputs, config)
        arguments = request_id, model, processor, model_id, inputs, config
        return super()._streaming(*arguments, **options)

    async def _non_streaming(
        self, request_id, model, processor, model_id, inputs, config, **options
    ):
        self.prepare(model, inputs, config)
        self.check(model, processor, inputs, config)
        arguments = request_id, model, processor, model_id, inputs, config
        return await super()._non_streaming(*arguments, **options)


class Responses(_Templated, ResponseHandler):
    """`/v1/responses`, where the tokenizer has a template."""

    async def handle_request(self, body: dict[str, Any], request_id: str):
        return await super().handle_request({"stream": False, **body}, request_id)  # as OpenAI's

    def _streaming(self, request_id, model, processor, model_id, body, inputs, config, **options):
        self.prepare(model, inputs, config)
        self.check(model, processor, inputs, config)
        arguments = request_id, model, processor, model_id, body, inputs, config
        return super()._streaming(*arguments, **options)

    async def _non_streaming(
        self, request_id, model, processor, model_id, body, inputs, config, **options
    ):
        self.prepare(model, inputs, config)
        self.check(model, processor, inputs, config)
        arguments = request_id, model, processor, model_id, body, inputs, config
        return await super()._non_streaming(*arguments, **options)


def make_app(checkpoint: str, device: str | None = None, dtype: str = "auto") -> FastAPI:
    """The library's server of a checkpoint, as an ASGI application.

    Args:
        checkpoint: A folder or a repository of the Hub. Requests call the model by this name.
        device: By default a GPU, if there is one.
        dtype: The weights', by default that in which they were saved.

    Raises:
        FileNotFoundError: If the checkpoint is a folder that does not exist or lacks a file.
    """
    check_checkpoint(checkpoint)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"

    manager = OneModel(device=device, dtype=dtype, force_model=checkpoint)
    state = GenerationState()
    parts = {"model_manager": manager, "generation_state": state}
    app = build_server(
        manager,
        Chats(**parts),
        completion_handler=Completions(**parts),
        response_handler=Responses(**parts),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(**parts),
        generation_state=state,
    )

    @app.exception_handler(HTTPException)
    async def refuse(_request: Request, error: HTTPException) -> JSONResponse:
        message = {"message": str(error.detail), "type": "invalid_request_error", "param": None}
        return JSONResponse({"error": message | {"code": None}}, error.status_code)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tarflow_hf.serve", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", help="a folder, or a repository of the Hub")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", help="by default a GPU, if there is one")
    parser.add_argument("--dtype", default="auto", help="by default that of the saved weights")
    arguments = parser.parse_args()

    app = make_app(arguments.checkpoint, arguments.device, arguments.dtype)
    uvicorn.run(app, host=arguments.host, port=arguments.port)


if __name__ == "__main__":
    main()
