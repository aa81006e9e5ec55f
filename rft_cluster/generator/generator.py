"""A generator: a vLLM engine in this process, which writes the completions of prompts.

One thread owns the engine. The methods post work to its inbox and wait, so weights change between the engine's
steps, never during one, and all calls may come from any thread.

    generate(prompts, ...)  ->  inbox  ->  [ engine thread: add_request, step, step, ... ]  ->  list[Group]
    load_weights, or start/update/finish_weight_update  ->  inbox  ->  the same thread, which steps on afterwards

Requests that an update falls into are pre-empted: their tokens stay, all that old weights computed of them is
dropped, and the new weights read prompt and tokens again before they write on.

A generator has a version only after an update that was whole; without the version that is asked of it, or a newer one,
it does not generate. The proof of an update (see `weights/`) may come while it generates: no group leaves before.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from rft_cluster.common.errors import StaleGenerator, WeightTransferError
from rft_cluster.common.hardware import Hardware
from rft_cluster.config import GeneratorsSection, ModelSection
from rft_cluster.generator.vllm_options import load_engine
from rft_cluster.messages import Completion, Group, Prompt, Sampling, WeightRecord
from rft_cluster.weights.digests import combined_digest

FORBIDDEN_BIAS = -100.0  # the lowest that vLLM takes: exp(-100) is never sampled
UPDATE_TIMEOUT = 600.0  # seconds from the first of an update's calls to the last
PROOF_TIMEOUT = 600.0  # seconds from the last token to the proof of the weights that wrote it
Result = TypeVar("Result")


@dataclass
class _Running:
    """A batch of prompts in the engine: its groups come in any order."""

    prompts: Sequence[Prompt]
    version: int
    group_size: int
    future: "Future[_Written]"
    groups: dict[int, Group] = field(default_factory=dict)


@dataclass(frozen=True)
class _Written:
    """Groups, and the proof of the newest weights that wrote them."""

    groups: list[Group]
    proof: "Future[None]"


class Generator:
    """See the module. Plain class: `cluster/` makes it a Ray actor."""

    def __init__(
        self,
        path: str,
        model: ModelSection,
        config: GeneratorsSection,
        max_tokens: int,
        hardware: Hardware,
        seed: int,
    ) -> None:
        """Starts the engine; returns when it is ready. `max_tokens`: prompt and completion together."""
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._running: dict[str, tuple[_Running, int]] = {}
        self._version: int | None = None
        self._whole = threading.Event()  # no update is under way
        self._whole.set()
        self._proof: Future[None] = Future()  # of the weights that are served
        self._in_process = hardware.device == "cpu"  # where the engine's one worker is, too
        self._batches = 0
        self._broken: BaseException | None = None  # what the engine failed with
        thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        thread.start()
        self._call(lambda: self._start(path, model, config, max_tokens, hardware, seed)).result()

    # What other roles call

    def serve_loaded(self, version: int) -> None:
        """Put the weights that the engine read from its folder into service, for a policy that is not trained on."""
        self._call(lambda: self._serve_loaded(version)).result()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Group]:
        """Groups in the order of their prompts, without images; every token is of weights of `version` or newer.

        What comes while weights are being updated begins with the new ones.

        Raises:
            StaleGenerator: this generator holds an older version, or none.
            WeightTransferError: the weights that wrote them turned out not to be those that were sent.
        """
        future: Future[_Written] = Future()
        while not self._call(lambda: self._submit(prompts, sampling, version, future)).result():
            if not self._whole.wait(UPDATE_TIMEOUT):
                raise WeightTransferError(f"an update took more than {UPDATE_TIMEOUT:g} s")
        written = future.result()
        try:
            written.proof.result(PROOF_TIMEOUT)
        except TimeoutError as error:
            raise WeightTransferError(f"no proof of version {version} came within {PROOF_TIMEOUT} s") from error
        return written.groups

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call(lambda: self._rpc("init_weight_transfer_engine", init_info=init_info)).result()

    def start_weight_update(self) -> None:
        self._call(self._start_update).result()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call(lambda: self._update(update_info)).result()

    def finish_weight_update(self, weight_version: str) -> None:
        """Put the received weights into service under `weight_version`."""
        self._call(lambda: self._finish_update(weight_version)).result()

    def load_weights(self, update_info: dict[str, Any], weight_version: str, data: Any = None) -> None:
        """A whole update, with weights that are all there.

        Args:
            data: the tensors' bytes, where they do not reach this host in another way.
        """
        info = update_info if data is None else {**update_info, "data": data}
        self._call(lambda: self._load(info, weight_version)).result()

    def prove_weights(self, weight_version: str, digests: dict[str, int]) -> WeightRecord:
        """Compare what was received with the digests of what was sent, and say what is served.

        Raises:
            WeightTransferError: they differ; all that waits for completions by these weights raises it, too.
        """
        try:
            self._check_engine()
            if self._version != int(weight_version):
                raise WeightTransferError(f"asked to prove version {weight_version}, but it holds {self._version}")
            prove = partial(_prove, digests=digests)
            # What takes time is done in the caller's thread, beside generation.
            work = (lambda worker: worker) if self._in_process else prove
            answers = self._call(lambda: self._engine.collective_rpc(work)).result()
            if self._in_process:
                answers = [prove(worker) for worker in answers]
        except BaseException as error:  # not swallowed: raised here and by all that wait for completions
            self._call(partial(self._give_up, error)).result()
            raise
        self._proof.set_result(None)
        loaded = combined_digest({str(rank): loaded for rank, (_, loaded) in enumerate(answers)})
        return WeightRecord(int(weight_version), answers[0][0], loaded)

    def sleep(self) -> None:
        """Give the GPU's memory back, weights included, to the learner that shares it. Weights must follow."""
        self._call(self._sleep).result()

    def wake_up(self, tags: list[str]) -> None:
        """Take memory again, in two parts: `["weights"]` before an update, `["kv_cache"]` after it."""
        self._call(lambda: self._engine.wake_up(tags)).result()

    # On the engine's thread

    def _sleep(self) -> None:
        self._version = None
        self._engine.sleep(level=2)

    def _start(
        self,
        path: str,
        model: ModelSection,
        config: GeneratorsSection,
        max_tokens: int,
        hardware: Hardware,
        seed: int,
    ) -> None:
        import torch

        from rft_cluster.model.encoder import PromptEncoder

        torch.set_flush_denormal(True)  # denormals slow a small model tenfold on CPUs
        self._encoder = PromptEncoder(path, model.min_pixels, model.max_pixels, model.trust_remote_code)
        limits = self._encoder.image_limits()
        self._llm = load_engine(path, model.trust_remote_code, config, max_tokens, limits, hardware, seed)
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._sampling_params, self._final_only = SamplingParams, RequestOutputKind.FINAL_ONLY
        self._engine = self._llm.llm_engine

    def _serve(self) -> None:
        while True:
            busy = bool(self._running) and self._whole.is_set()
            try:
                work = self._inbox.get(block=not busy)
            except queue.Empty:
                self._step()
            else:
                work()

    def _step(self) -> None:
        try:
            for output in self._engine.step():
                if output.finished:
                    batch, index = self._running[output.request_id]
                    batch.groups[index] = self._group(batch.prompts[index], output, batch)
                    del self._running[output.request_id]
                    if len(batch.groups) == len(batch.prompts):
                        groups = [batch.groups[i] for i in range(len(batch.prompts))]
                        batch.future.set_result(_Written(groups, self._proof))
        except BaseException as error:  # noqa: BLE001 - not swallowed: every caller that waits raises it
            # What broke the engine is the answer to everybody who waits for it; it serves nobody after that.
            self._version, self._broken = None, error
            self._fail(error)

    def _check_engine(self) -> None:
        if self._broken:
            raise self._broken

    def _fail(self, error: BaseException) -> None:
        for batch in {id(batch): batch for batch, _ in self._running.values()}.values():
            batch.future.set_exception(error)
        self._running.clear()

    def _submit(self, prompts: Sequence[Prompt], sampling: Sampling, version: int, future: "Future[_Written]") -> bool:
        """Give prompts to the engine; false, and nothing done, while weights are being updated."""
        self._check_engine()
        if not self._whole.is_set():
            return False
        if self._version is None or self._version < version:
            raise StaleGenerator(f"asked for version {version}, but this generator holds version {self._version}")
        batch = _Running(prompts, version, sampling.group_size, future)
        self._batches += 1
        if not prompts:
            future.set_result(_Written([], self._proof))
        begun: list[str] = []
        try:
            for index, prompt in enumerate(prompts):
                inputs = {
                    "prompt": self._encoder.chat(prompt.text),
                    "multi_modal_data": {"image": self._encoder.image(prompt.image)},
                }
                request_id = f"{self._batches}-{index}"
                self._engine.add_request(request_id, inputs, self._params(prompt, sampling))
                begun.append(request_id)
        except BaseException:  # not swallowed: nobody would wait for those before
            self._engine.abort_request(begun)
            raise
        self._running |= {request_id: (batch, index) for index, request_id in enumerate(begun)}
        return True

    def _params(self, prompt: Prompt, sampling: Sampling) -> Any:
        """Every parameter that shapes the distribution is named: nothing comes from a default elsewhere."""
        return self._sampling_params(
            n=sampling.group_size,
            temperature=sampling.temperature,
            top_p=1.0,
            top_k=sampling.top_k,
            min_p=0.0,
            repetition_penalty=1.0,
            seed=prompt.seed,
            max_tokens=sampling.max_tokens,
            stop_token_ids=self._encoder.stop_token_ids,
            logprobs=0,  # of the sampled token alone
            logit_bias=dict.fromkeys(self._encoder.forbidden_token_ids, FORBIDDEN_BIAS),
            skip_special_tokens=True,
            output_kind=self._final_only,  # a group comes whole, when its last completion is done
        )

    def _group(self, prompt: Prompt, output: Any, batch: _Running) -> Group:
        version, group_size = batch.version, batch.group_size
        completions = []
        for answer in output.outputs:
            spans = tuple((int(span.version), span.end - span.start) for span in answer.weight_versions)
            oldest = min(span_version for span_version, _ in spans)
            if oldest < version:
                raise StaleGenerator(f"{prompt.prompt_id}: asked for version {version}, written by {oldest}")
            token_ids = list(answer.token_ids)
            completions.append(
                Completion(
                    token_ids=token_ids,
                    generator_logprobs=[
                        step[token].logprob for step, token in zip(answer.logprobs, token_ids, strict=True)
                    ],
                    text=answer.text,
                    finish_reason=answer.finish_reason,
                    policy_version=oldest,
                    version_spans=spans if len(spans) > 1 else (),
                )
            )
        if len(completions) != group_size:
            raise RuntimeError(f"{prompt.prompt_id}: {len(completions)} completions came back, {group_size} were asked")
        return Group(replace(prompt, image=b""), list(output.prompt_token_ids), completions)

    def _serve_loaded(self, version: int) -> None:
        self._engine.set_weight_version(str(version))
        self._version, self._proof = version, Future()
        self._proof.set_result(None)

    def _load(self, update_info: dict[str, Any], weight_version: str) -> None:
        self._start_update()
        self._update(update_info)
        self._finish_update(weight_version)

    def _start_update(self) -> None:
        self._check_engine()
        self._version = None
        self._whole.clear()
        if not self._proof.done():
            self._proof.set_exception(WeightTransferError("another update began before this one was proved"))
        self._proof = Future()
        with self._or_give_up():
            self._rpc("start_weight_update")

    def _update(self, update_info: dict[str, Any]) -> None:
        with self._or_give_up():
            self._rpc("update_weights", update_info=update_info)

    def _finish_update(self, weight_version: str) -> None:
        with self._or_give_up():
            self._put_into_service(weight_version)
        self._whole.set()

    @contextmanager
    def _or_give_up(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # not swallowed: raised here and by all that wait for completions
            self._give_up(error)
            raise

    def _put_into_service(self, weight_version: str) -> None:
        self._rpc("finish_weight_update")
        # Keys, values and image embeddings of the old weights must not outlive them. The prefix reset leaves the
        # encoder cache as it is, on every build (vllm#44910).
        if not self._engine.reset_prefix_cache(reset_running_requests=bool(self._running)):
            raise RuntimeError("vLLM did not reset its prefix cache: requests still hold blocks of old weights")
        self._engine.reset_encoder_cache()
        if not_loaded := [layer for worker in self._engine.collective_rpc(_not_loaded) for layer in worker]:
            raise WeightTransferError(
                f"version {weight_version} arrived but {len(not_loaded)} layers did not load theirs, "
                f"first {not_loaded[0]}"
            )
        self._engine.set_weight_version(weight_version)
        self._version = int(self._engine.get_weight_version())

    def _give_up(self, error: BaseException) -> None:
        """Serve nobody with weights that are not those that were sent, until an update that is."""
        self._version = None
        if self._proof.done():
            self._proof = Future()
        self._proof.set_exception(error)
        self._engine.abort_request(list(self._running))
        self._fail(error)
        self._whole.set()

    def _rpc(self, method: str, **arguments: Any) -> None:
        self._engine.collective_rpc(method, kwargs=arguments)

    # Between threads

    def _call(self, work: Callable[[], Result]) -> "Future[Result]":
        """Run `work` on the engine's thread."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - not swallowed: the caller raises it
                future.set_exception(error)

        self._inbox.put(run)
        return future


# In a worker of the engine


def _not_loaded(worker: Any) -> Sequence[str]:
    return worker.weight_transfer_engine.not_loaded


def _prove(worker: Any, digests: dict[str, int]) -> tuple[int, int]:
    return worker.weight_transfer_engine.prove(digests)
