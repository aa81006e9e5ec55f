"""A generator: a vLLM engine in this process, which writes the completions of prompts.

    generator.py       what other roles call (this file); any thread may, and waits for the answer
    engine_thread.py   the one thread that owns the engine: requests, steps, running batches
    weight_state.py    which weights are served: five states, drawn there
    vllm_options.py    what vLLM is told

Requests in flight during an update are pre-empted. Tokens sampled so far are kept; their KV cache is dropped, and
prompt plus tokens are prefilled again with the new weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from rft_cluster.common.errors import WeightTransferError
from rft_cluster.generator.engine_thread import Batch, EngineThread, Result
from rft_cluster.generator.vllm_options import EngineOptions, load_engine, sampling_params
from rft_cluster.generator.weight_state import WeightState
from rft_cluster.messages import Group, Images, Prompt, Sampling, WeightRecord
from rft_cluster.weights.digests import added_up, combined_digest

VERIFY_TIMEOUT = 600.0  # seconds from the last token to the verification of the weights that wrote it


class Generator:
    """See the module. Plain class: `cluster/` makes it a Ray actor."""

    def __init__(self, options: EngineOptions, images: Images) -> None:
        """Starts the engine; returns when it is ready. `images`: those of the prompts that it will be asked."""
        self._images = images
        self._weights = WeightState()
        self._thread = EngineThread(self._weights)
        self._in_process = options.hardware.device == "cpu"  # where the engine's one worker is, too
        self._on_thread(lambda: self._start(options))

    # What other roles call

    def serve_loaded(self, version: int) -> None:
        """Use the weights that the engine read from its folder as `version`, for a policy that is not trained on."""

        def serve() -> None:
            self._engine.set_weight_version(str(version))
            self._weights.serve(version)

        self._on_thread(serve)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Group]:
        """Groups in the order of their prompts; every token is of weights of `version` or newer.

        A request that comes while weights are being updated begins with the new ones.

        Raises:
            StaleGenerator: this generator holds an older version, or none.
            WeightTransferError: the weights that wrote them turned out not to be those that were sent.
        """
        batch = Batch(prompts, sampling.group_size, version)
        while not self._on_thread(lambda: self._submit(batch, sampling)):
            self._weights.wait_for_update()
        written = batch.written.result()
        try:
            written.verification.result(VERIFY_TIMEOUT)
        except TimeoutError as error:
            raise WeightTransferError(f"version {version} was not verified within {VERIFY_TIMEOUT:g} s") from error
        return written.groups

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._on_thread(lambda: self._rpc("init_weight_transfer_engine", init_info=init_info))

    def start_weight_update(self) -> None:
        def start() -> None:
            self._weights.begin_update()
            with self._or_refused():
                self._rpc("start_weight_update")

        self._on_thread(start)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        def update() -> None:
            with self._or_refused():
                self._rpc("update_weights", update_info=update_info)

        self._on_thread(update)

    def finish_weight_update(self, version: int) -> None:
        """Put the received weights into service under `version`."""

        def finish() -> None:
            with self._or_refused():
                self._put_into_service(version)

        self._on_thread(finish)

    def load_weights(self, update_info: dict[str, Any], version: int, data: Any = None) -> None:
        """A whole update, with weights that are all there.

        Args:
            data: the tensors' bytes, where they do not reach this host in another way.
        """
        self.start_weight_update()
        self.update_weights(update_info if data is None else {**update_info, "data": data})
        self.finish_weight_update(version)

    def verify_weights(self, version: int, *digests: Mapping[str, int]) -> WeightRecord:
        """Compare what was received with what was sent, and say what is served.

        Args:
            digests: of what each learner rank sent, by the tensor's name.

        Raises:
            WeightTransferError: they differ; all that waits for completions by these weights raises it, too.
        """
        verify = partial(_verify, digests=added_up(digests))
        try:
            self._on_thread(lambda: self._weights.check_held(version))
            # What takes time is done in the caller's thread, beside generation.
            work = (lambda worker: worker) if self._in_process else verify
            answers = self._on_thread(lambda: self._engine.collective_rpc(work))
            if self._in_process:
                answers = [verify(worker) for worker in answers]
            self._on_thread(lambda: self._weights.verify(version))
        except BaseException as error:  # not swallowed: raised here and by all that wait for completions
            self._on_thread(partial(self._refuse, error))
            raise
        loaded = combined_digest({str(rank): loaded for rank, (_, loaded) in enumerate(answers)})
        return WeightRecord(version, answers[0][0], loaded)

    def sleep(self) -> None:
        """Give the GPU's memory back, weights included, to the learner that shares it. Weights must follow."""

        def sleep() -> None:
            self._weights.drop()
            self._engine.sleep(level=2)

        self._on_thread(sleep)

    def wake_up(self, tags: list[str]) -> None:
        """Take memory again, in two parts: `["weights"]` before an update, `["kv_cache"]` after it."""
        self._on_thread(lambda: self._engine.wake_up(tags))

    # On the engine's thread

    def _on_thread(self, work: Callable[[], Result]) -> Result:
        return self._thread.call(work).result()

    @property
    def _engine(self) -> Any:
        return self._thread.engine

    def _start(self, options: EngineOptions) -> None:
        import torch

        from rft_cluster.model.encoder import PromptEncoder

        torch.set_flush_denormal(True)  # denormals slow a small model tenfold on CPUs
        model = options.model
        self._encoder = PromptEncoder(options.path, model.min_pixels, model.max_pixels, model.trust_remote_code)
        self._llm = load_engine(options, self._encoder.image_limits())
        self._thread.engine = self._llm.llm_engine

    def _submit(self, batch: Batch, sampling: Sampling) -> bool:
        """Give prompts to the engine; false, and nothing done, while weights are being updated."""
        if not self._weights.admits(batch.version):
            return False
        self._thread.submit(batch, (self._request(prompt, sampling) for prompt in batch.prompts))
        return True

    def _request(self, prompt: Prompt, sampling: Sampling) -> tuple[dict[str, Any], Any]:
        inputs = {
            "prompt": self._encoder.chat(prompt.text),
            "multi_modal_data": {"image": self._encoder.image(self._images[prompt.example.image.sha256])},
        }
        encoder = self._encoder
        return inputs, sampling_params(sampling, prompt.seed, encoder.stop_token_ids, encoder.forbidden_token_ids)

    @contextmanager
    def _or_refused(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # not swallowed: raised here and by all that wait for completions
            self._refuse(error)
            raise

    def _refuse(self, error: BaseException) -> None:
        """Serve nobody with weights that are not those that were sent, until an update that is."""
        self._weights.refuse(error)
        self._thread.abort(error)

    def _put_into_service(self, version: int) -> None:
        self._rpc("finish_weight_update")
        # Keys, values and image embeddings of the old weights must not outlive them. The prefix reset leaves the
        # encoder cache as it is, on every build (vllm#44910).
        if not self._engine.reset_prefix_cache(reset_running_requests=self._thread.busy):
            raise RuntimeError("vLLM did not reset its prefix cache: requests still hold blocks of old weights")
        self._engine.reset_encoder_cache()
        if not_loaded := [layer for worker in self._engine.collective_rpc(_not_loaded) for layer in worker]:
            raise WeightTransferError(
                f"version {version} arrived but {len(not_loaded)} layers did not load theirs, first {not_loaded[0]}"
            )
        self._engine.set_weight_version(str(version))  # vLLM stamps it on every token
        self._weights.end_update(version)

    def _rpc(self, method: str, **arguments: Any) -> None:
        self._engine.collective_rpc(method, kwargs=arguments)


# In a worker of the engine


def _not_loaded(worker: Any) -> Sequence[str]:
    return worker.weight_transfer_engine.not_loaded


def _verify(worker: Any, digests: dict[str, int]) -> tuple[int, int]:
    return worker.weight_transfer_engine.verify(digests)
