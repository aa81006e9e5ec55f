"""The thread that owns a vLLM engine. It steps the engine while there are requests, and runs other calls in between.

    call(work)    ->  inbox  ->  [ engine thread: work(), step, step, ... ]  ->  Future of work's result
    submit(batch) on that thread: add_request for each prompt; `batch.written` is done when all completions are finished

During a weight update the engine does not step. So weights change between two steps, never within one.
"""

import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rft_cluster.common.errors import EngineFailed, StaleGenerator
from rft_cluster.generator.engine_stats import EngineStats
from rft_cluster.generator.weight_state import WeightState
from rft_cluster.messages import Completion, Group, Prompt

Result = TypeVar("Result")


@dataclass(frozen=True)
class Written:
    """Finished groups, and the verification of the newest weights that wrote them."""

    groups: list[Group]
    verification: "Future[None]"


@dataclass
class Batch:
    """Prompts of one call. Their groups finish in any order."""

    prompts: Sequence[Prompt]
    group_size: int
    version: int  # oldest version of the weights that may write the completions
    opening: str  # of each completion's text, written by the chat template
    written: "Future[Written]" = field(default_factory=Future)
    groups: dict[int, Group] = field(default_factory=dict)  # finished groups by the prompt's index


class EngineThread:
    """Runs the engine. `engine` is vLLM's `LLMEngine`; only work passed to `call` may use it."""

    def __init__(self, weights: WeightState, stats: EngineStats) -> None:
        self.engine: Any = None
        self._stats = stats
        self._weights = weights
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._running: dict[str, tuple[Batch, int]] = {}  # vLLM's request id -> batch, and the prompt's index in it
        self._batches = 0
        threading.Thread(target=self._serve, name="engine", daemon=True).start()

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def call(self, work: Callable[[], Result]) -> "Future[Result]":
        """Run `work` on the engine's thread, in the order of the calls."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - not swallowed: the caller raises it
                future.set_exception(error)

        self._inbox.put(run)
        return future

    # On the thread

    def submit(self, batch: Batch, requests: Sequence[tuple[Any, Any]]) -> None:
        """Add a request (vLLM's inputs, sampling parameters) for each prompt of the batch, or for none if one fails."""
        # An empty batch has no last completion that would finish it. Its answer still carries the verification.
        if not batch.prompts:
            batch.written.set_result(Written([], self._weights.verification))
        # vLLM needs ids that are unique in the engine.
        self._batches += 1
        begun: list[str] = []
        try:
            for inputs, sampling in requests:
                request_id = f"{self._batches}-{len(begun)}"
                self.engine.add_request(request_id, inputs, sampling)
                begun.append(request_id)
        except BaseException:  # not swallowed: the caller raises it, so nobody would wait for the requests added so far
            self.engine.abort_request(begun)
            raise
        # Only a complete batch counts as running: `_step` looks up every finished request here.
        self._running |= {request_id: (batch, index) for index, request_id in enumerate(begun)}

    def abort(self, error: BaseException) -> None:
        """Abort all requests. Every caller that waits for one raises `error`."""
        self.engine.abort_request(list(self._running))
        self._end(error)

    def drop_tokens_in_flight(self) -> None:
        """Have the tokens sampled anew that the old weights have sampled and vLLM has not yet delivered.

        With asynchronous scheduling (on GPUs) there may be one a request. `reset_prefix_cache` drops those of running
        requests. A request that vLLM had preempted for lack of blocks would still get its token, stamped with the new
        version.
        """
        for request in self.engine.engine_core.engine_core.scheduler.requests.values():
            if request.num_stale_output_tokens:
                request.drop_stale_output = True

    def _serve(self) -> None:
        while True:
            may_step = self.busy and not self._weights.updating
            try:
                work = self._inbox.get(block=not may_step)
            except queue.Empty:
                self._step()
            else:
                work()

    def _step(self) -> None:
        """Step the engine: about one token for each running completion, as vLLM schedules them."""
        try:
            for output in self.engine.step():
                # With FINAL_ONLY a request's only output has all completions of its prompt.
                # Requests of a batch that was dropped may still end here.
                if output.finished and output.request_id in self._running:
                    batch, index = self._running.pop(output.request_id)
                    self._stats.finished(output)
                    try:
                        batch.groups[index] = group_of(batch.prompts[index], output, batch)
                    except StaleGenerator as error:  # the engine is well; this batch came before older weights did
                        self._drop(batch, error)
                        continue
                    # vLLM finishes prompts in any order. A batch is answered as a whole, in the caller's order, with
                    # the verification of the present weights: they are the newest that wrote any of its tokens.
                    if len(batch.groups) == len(batch.prompts):
                        groups = [batch.groups[i] for i in range(len(batch.prompts))]
                        batch.written.set_result(Written(groups, self._weights.verification))
        except BaseException as error:  # noqa: BLE001 - not swallowed: every caller that waits raises it
            # Every present and later caller gets this error. Do not ask the engine to abort requests: after a failed
            # step its state is unknown.
            traceback.print_exc()  # to the actor's log
            failed = EngineFailed(f"its engine failed ({type(error).__name__}: {error})")
            self._weights.fail(failed)
            self._end(failed)

    def _drop(self, batch: Batch, error: BaseException) -> None:
        """Abort the requests of one batch. Whoever waits for it raises `error`."""
        own = [request_id for request_id, (other, _) in self._running.items() if other is batch]
        self.engine.abort_request(own)
        for request_id in own:
            del self._running[request_id]
        batch.written.set_exception(error)

    def _end(self, error: BaseException) -> None:
        for batch in {id(batch): batch for batch, _ in self._running.values()}.values():
            batch.written.set_exception(error)
        self._running.clear()


def group_of(prompt: Prompt, output: Any, batch: Batch) -> Group:
    """Convert vLLM's `RequestOutput` to a group. Each completion has the versions of the weights that wrote it.

    Raises:
        StaleGenerator: weights older than the batch's version wrote a token.
    """
    completions = []
    for answer in output.outputs:
        spans = tuple((int(span.version), span.end - span.start) for span in answer.weight_versions)
        oldest = min(version for version, _ in spans)
        if oldest < batch.version:
            raise StaleGenerator(f"{prompt.prompt_id}: asked for version {batch.version}, written by {oldest}")
        token_ids = list(answer.token_ids)
        completions.append(
            Completion(
                token_ids=token_ids,
                generator_logprobs=[
                    step[token].logprob for step, token in zip(answer.logprobs, token_ids, strict=True)
                ],
                text=batch.opening + answer.text,
                finish_reason=answer.finish_reason,
                policy_version=oldest,
                version_spans=spans if len(spans) > 1 else (),
            )
        )
    if len(completions) != batch.group_size:
        raise RuntimeError(
            f"{prompt.prompt_id}: {len(completions)} completions came back, {batch.group_size} were asked"
        )
    return Group(prompt, list(output.prompt_token_ids), completions)
