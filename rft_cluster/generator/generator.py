"""A generator: a vLLM engine in this process that writes completions for prompts.

    generator.py       the methods for other roles (this file); any thread may call them, and waits for the answer
    engine_thread.py   the one thread that owns the engine: requests, steps, running batches
    weight_state.py    the state of the served weights: five states, drawn there
    vllm_options.py    vLLM's options

Requests in flight during an update are pre-empted. Tokens sampled so far are kept; their KV cache is dropped, and
prompt plus tokens are prefilled again with the new weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from rft_cluster.common.errors import StaleGenerator, WeightTransferError
from rft_cluster.generator.engine_stats import EngineStats
from rft_cluster.generator.engine_thread import Batch, EngineThread, Result
from rft_cluster.generator.vllm_options import EngineOptions, load_engine, sampling_params, within_memory
from rft_cluster.generator.weight_state import WeightState
from rft_cluster.messages import Group, Images, Prompt, Sampling, WeightRecord
from rft_cluster.weights.digests import added_up, combined_digest


class Generator:
    """A plain class; `cluster/` makes it a Ray actor."""

    def __init__(self, options: EngineOptions, images: Images) -> None:
        """Start the engine, and return when it is ready. `images`: the images of all later prompts."""
        self._images = images
        self._timeout = options.timeout
        self._weights = WeightState(self._timeout)
        self.stats = EngineStats()
        self._thread = EngineThread(self._weights, self.stats)
        self._asleep = False
        self._in_process = options.hardware.device == "cpu"  # on CPUs the engine's only worker is in this process
        self._on_thread(lambda: self._start(options))

    # What other roles call

    def serve_checkpoint(self, version: int) -> None:
        """Serve the weights in the engine's folder as `version`. For a policy that is not being trained."""

        def serve() -> None:
            self._engine.set_weight_version(str(version))
            self._weights.serve(version)

        self._on_thread(serve)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Group]:
        """Generate a group for each prompt, in order. Every token is by weights of `version` or newer.

        A request that arrives during a weight update waits for the new weights.

        Raises:
            StaleGenerator: this generator has an older version, or none.
            WeightTransferError: the weights did not verify.
        """
        batch = Batch(prompts, sampling.group_size, version, self._encoder.opening)
        # Images are decoded and resized in this thread, so that the engine goes on meanwhile.
        requests = [self._request(prompt, sampling) for prompt in prompts]
        while not self._on_thread(lambda: self._submit(batch, requests)):
            self._weights.wait_for_update()
        requests.clear()  # the engine has its own copies of the images
        written = batch.written.result()
        try:
            written.verification.result(self._timeout)
        except TimeoutError as error:
            within = f"within {self._timeout:g} s (cluster.step_timeout)"
            raise WeightTransferError(f"version {version} was not verified {within}") from error
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
        """Serve the received weights as `version`."""

        def finish() -> None:
            with self._or_refused():
                self._put_into_service(version)

        self._on_thread(finish)

    def load_weights(self, update_info: dict[str, Any], version: int, data: Any = None) -> None:
        """Make a complete update in one call, with weights that have all been sent.

        Args:
            data: the tensors' bytes, if this host cannot map the learners' memory.
        """
        self.start_weight_update()
        self.update_weights(update_info if data is None else {**update_info, "data": data})
        self.finish_weight_update(version)

    def verify_weights(self, version: int, *digests: Mapping[str, int]) -> WeightRecord:
        """Verify the received weights, and return their record.

        Args:
            digests: for each learner rank, tensor name -> digest of the part that it sent.

        Raises:
            WeightTransferError: the digests differ. Callers that wait for completions by these weights raise it, too.
        """
        verify = partial(_verify, digests=added_up(digests))
        try:
            self._on_thread(lambda: self._weights.check_held(version))
            # The digests take time, so compute them in the caller's thread while the engine generates.
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

    def abort(self) -> None:
        """Abort all requests: nobody waits for their groups any more."""
        self._on_thread(lambda: self._thread.abort(StaleGenerator("the rollout was dropped")))

    def sleep(self) -> None:
        """Free the GPU's memory, weights included, for the learner that shares it. An update must follow.

        With SFT there may be several calls before the update: generators are woken up for evaluations alone.
        """

        def sleep() -> None:
            if not self._asleep:
                self._weights.drop()
                self._engine.sleep(level=2)
                self._asleep = True

        self._on_thread(sleep)

    def wake_up(self, tags: list[str]) -> None:
        """Take memory again, in two steps: `["weights"]` before an update, `["kv_cache"]` after it."""

        def wake_up() -> None:
            self._engine.wake_up(tags)
            self._asleep = False
            if "weights" in tags:
                self._engine.collective_rpc(_clear_leftovers)

        self._on_thread(wake_up)

    # On the engine's thread

    def _on_thread(self, work: Callable[[], Result]) -> Result:
        with within_memory():  # an engine takes memory for weights, too, and whenever it wakes up
            return self._thread.call(work).result()

    @property
    def _engine(self) -> Any:
        return self._thread.engine

    def _start(self, options: EngineOptions) -> None:
        import torch

        from rft_cluster.model.encoder import PromptEncoder

        torch.set_flush_denormal(True)  # denormals slow a small model tenfold on CPUs
        self._encoder = PromptEncoder(options.path, options.model)
        self._llm = load_engine(options, self._encoder.image_limits())
        self._thread.engine = self._llm.llm_engine
        self._engine.logger_manager = self.stats
        # No figures of each request at each token: they took 2 to 6 % of a small model's generation.
        self._engine.log_stats = self._engine.output_processor.log_stats = False

    def _submit(self, batch: Batch, requests: Sequence[tuple[Any, Any]]) -> bool:
        """Submit a batch to the engine. Returns False, and does nothing, during a weight update."""
        # Admission and submission are one call on the engine's thread, so no update can start in between.
        if not self._weights.admits(batch.version):
            return False
        self._thread.submit(batch, requests)
        return True

    def _request(self, prompt: Prompt, sampling: Sampling) -> tuple[dict[str, Any], Any]:
        encoder, reference = self._encoder, prompt.example.image
        # The engine keeps images by their pixels, so it does not take one augmentation of an image for another.
        shown = encoder.image(self._images[reference.sha256], reference.augmentation)
        inputs = {"prompt": encoder.chat(prompt.text), "multi_modal_data": {"image": shown}}
        return inputs, sampling_params(sampling, prompt.seed, encoder.stop_token_ids, encoder.forbidden_token_ids)

    @contextmanager
    def _or_refused(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # not swallowed: raised here and by all that wait for completions
            self._refuse(error)
            raise

    def _refuse(self, error: BaseException) -> None:
        """Stop serving weights that failed to load or to verify, and abort all requests."""
        self._weights.refuse(error)
        self._thread.abort(error)

    def _put_into_service(self, version: int) -> None:
        self._rpc("finish_weight_update")
        # KV cache and image embeddings of the old weights must be dropped. Resetting the prefix cache keeps the encoder
        # cache, on every build (vllm#44910).
        if not self._engine.reset_prefix_cache(reset_running_requests=self._thread.busy):
            raise RuntimeError("vLLM did not reset its prefix cache: requests still hold blocks of old weights")
        self._thread.drop_tokens_in_flight()
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


def _clear_leftovers(worker: Any) -> None:
    """Set to zero, as it was at the engine's start, what lies in the memory of the weights, is no registered buffer,
    and is read before it is written: after a sleep it holds anything.

    - The rows that vLLM adds after the first text layers of a Qwen3-VL. They are added to every token.
    - M-RoPE's positions, with vLLM's second model runner. A padded batch reads those beyond its tokens, as indices.
    """
    for rows in vars(worker.weight_transfer_engine.model).get("deepstack_input_embeds", ()):
        rows.zero_()
    state = vars(worker.model_runner).get("model_state")
    rope = vars(state).get("rope_state") if state else None
    if rope:
        rope.positions.zero_()


def _verify(worker: Any, digests: dict[str, int]) -> tuple[int, int]:
    return worker.weight_transfer_engine.verify(digests)
