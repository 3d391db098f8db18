"""What a core that is built like vLLM's does with requests: each is pinned once, and released once however it ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steer_vllm.config import SteerConfig
from steer_vllm.engine import adapters
from steer_vllm.engine import lifetimes as module
from steer_vllm.engine.settings import KEY, entry
from steer_vllm.errors import ArtifactInvalid, SteerError, Unsupported
from steer_vllm.plan import PartSummary, Plan, Summary
from steer_vllm.positions import Positions
from steer_vllm.request import EXTRA_ARG, Steering
from steer_vllm.segments import Component

D = "d" * 64


class Params:
    """Sampling parameters, as far as the core looks at them."""

    def __init__(self, digest: str | None = D) -> None:
        steering = Steering((Component(digest, 1.0, Positions.parse("all")),)) if digest else None
        self.extra_args: dict[str, Any] | None = {EXTRA_ARG: steering.to_wire()} if steering else None


def lora(name: str = "mine", number: int = 1, path: str = "/old", in_place: bool = False) -> Any:
    return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=path, load_inplace=in_place)


class Media:
    """vLLM's cache of pictures: what a request sends, and which of them the front need not send again."""

    def __init__(self) -> None:
        self.held: list[str] = []

    def get_and_update_features(self, features: list[str]) -> list[str]:
        self.held += features
        return features


def request(request_id: str = "r", digest: str | None = D, **more: Any) -> Any:
    base = {"request_id": request_id, "sampling_params": Params(digest), "prompt_token_ids": [1, 2, 3]}
    return SimpleNamespace(**{**base, "prompt_embeds": None, "lora_request": None, "mm_features": None, **more})


@pytest.fixture
def core() -> Any:
    """A core with one content loaded; `fails` makes building a request fail, `closed` turns requests away."""

    class Scheduler:
        def _free_request(self, request: Any, delay_free_blocks: bool = False) -> None: ...

    class Core:
        fails = closed = False
        mm_receiver_cache: Media | None = None

        def __init__(self) -> None:
            config = SteerConfig(additive_rows=1, low_rank_rows=1)
            self.vllm_config = SimpleNamespace(
                additional_config={KEY: entry(config)}, model_config=SimpleNamespace(dtype=torch.float32)
            )
            self.scheduler = Scheduler()

        def preprocess_add_request(self, request: Any) -> tuple[Any, int]:
            if self.mm_receiver_cache is not None and request.mm_features:
                request.mm_features = self.mm_receiver_cache.get_and_update_features(request.mm_features)
            if self.fails:
                raise ValueError("a grammar that cannot be compiled")
            return request, 0

        def add_lora(self, lora_request: Any) -> bool:
            if self.fails:
                raise ValueError("no such folder")
            return True

        def remove_lora(self, lora_id: int) -> bool:
            return True

        def _reject_add_in_shutdown(self, request: Any) -> bool:
            return self.closed

    module._patch_preprocess(Core)
    module._patch_reject(Core, "_reject_add_in_shutdown")
    module._patch_free(Scheduler)
    module._patch_lora(Core, "add_lora", lambda lora_request: lora_request.lora_int_id)
    module._patch_lora(Core, "remove_lora", lambda lora_id: lora_id)
    made = Core()
    admission = module.admission_of(made)
    assert admission is not None
    admission.publish(Summary(D, (PartSummary(True, 0, 1.0),)))
    return made


def pinned(core: Any) -> int:
    return core.steering.facts()["pinned"]  # type: ignore[no-any-return]


def test_from_arrival_to_its_end(core: Any) -> None:
    given = request()
    params = given.sampling_params
    taken, _ = core.preprocess_add_request(given)
    assert isinstance(module.plan_of(taken.sampling_params), Plan)
    assert isinstance(params.extra_args[EXTRA_ARG], str), "the caller's parameters stay as they were"
    assert pinned(core) == 1
    assert not core._reject_add_in_shutdown(taken)
    core.scheduler._free_request(taken, delay_free_blocks=True)
    assert pinned(core) == 0
    core.scheduler._free_request(taken)


def test_base_requests_hold_nothing(core: Any) -> None:
    taken, _ = core.preprocess_add_request(request(digest=None))
    assert module.plan_of(taken.sampling_params) is None
    assert pinned(core) == 0
    core.closed = True
    assert core._reject_add_in_shutdown(taken)
    core.scheduler._free_request(taken)


def test_what_vllm_cannot_build_is_released(core: Any) -> None:
    core.fails = True
    with pytest.raises(ValueError, match="grammar"):
        core.preprocess_add_request(request())
    assert pinned(core) == 0


def test_what_ceases_to_fit_on_its_way_to_the_scheduler(core: Any) -> None:
    """Admitted in the input thread, and weights changed in the main loop before it came there."""
    taken, _ = core.preprocess_add_request(request(client_index=3))
    core.steering.spoil("weights unknown")
    told: list[Any] = []
    core.output_queue, core._send_error_outputs_to_client = None, lambda *of: told.append(of)
    assert core._reject_add_in_shutdown(taken)
    assert told == [(["r"], 3)]
    assert pinned(core) == 0


def test_what_is_turned_away_is_released(core: Any) -> None:
    taken, _ = core.preprocess_add_request(request())
    core.closed = True
    assert core._reject_add_in_shutdown(taken)
    assert pinned(core) == 0


def test_a_second_request_of_an_id_takes_nothing_from_the_first(core: Any) -> None:
    """Invariant: nothing is freed while a running request needs it: the second is turned away, the first still runs."""
    first, _ = core.preprocess_add_request(request("same"))
    second, _ = core.preprocess_add_request(request("same"))
    core.closed = True
    core._reject_add_in_shutdown(second)
    assert pinned(core) == 1
    assert not core.steering.close(D)
    core.scheduler._free_request(first)
    assert core.steering.close(D)


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (request(digest="f" * 64), ArtifactInvalid),
        (request(resumable=True), Unsupported),
        (request(sampling_params=SimpleNamespace(extra_args={EXTRA_ARG: "{}"})), SteerError),
    ],
)
def test_what_is_refused_holds_nothing(core: Any, asked: Any, error: type[SteerError]) -> None:
    with pytest.raises(error):
        core.preprocess_add_request(asked)
    assert pinned(core) == 0


def test_an_engine_without_steering_refuses(core: Any) -> None:
    core.vllm_config.additional_config = {}
    del core.steering
    with pytest.raises(Unsupported, match="without steering"):
        core.preprocess_add_request(request())


@pytest.mark.parametrize("steered", [True, False])
def test_pictures_of_a_refused_request_are_taken_in(core: Any, steered: bool) -> None:
    """vLLM's front counts them as held, and sends nobody's next request with their content."""
    core.mm_receiver_cache = Media()
    if not steered:
        core.vllm_config.additional_config = {}
        del core.steering
    with pytest.raises(SteerError):
        core.preprocess_add_request(request(digest="f" * 64, mm_features=["a", "b"]))
    assert core.mm_receiver_cache.held == ["a", "b"]


def test_pictures_are_taken_in_once(core: Any) -> None:
    core.mm_receiver_cache = Media()
    core.preprocess_add_request(request(mm_features=["a"]))
    assert core.mm_receiver_cache.held == ["a"]
    with pytest.raises(SteerError):
        core.preprocess_add_request(request(digest="f" * 64))
    core.mm_receiver_cache = None
    with pytest.raises(ArtifactInvalid):
        core.preprocess_add_request(request(digest="f" * 64, mm_features=["a"]))


class TestAdapters:
    """Invariant: an adapter is used beside an intervention only while it is the one that the ranks were asked about."""

    @pytest.fixture
    def paired(self, core: Any) -> Any:
        core.steering.pair(adapters.identity(lora()), D)
        core.steering.pair(adapters.identity(lora("other", 2)), D)
        core.preprocess_add_request(request(lora_request=lora()))
        return core

    def refused(self, core: Any) -> None:
        with pytest.raises(Unsupported, match="was not checked"):
            core.preprocess_add_request(request(lora_request=lora()))
        core.preprocess_add_request(request(lora_request=lora("other", 2)))

    def test_loaded_again_from_another_folder(self, paired: Any) -> None:
        assert paired.add_lora(lora(path="/new", in_place=True))
        self.refused(paired)
        paired.steering.pair(adapters.identity(lora()), D)
        paired.preprocess_add_request(request(lora_request=lora()))

    def test_removed(self, paired: Any) -> None:
        assert paired.remove_lora(1)
        self.refused(paired)

    def test_a_load_that_failed(self, paired: Any) -> None:
        """Some ranks may have the new weights."""
        paired.fails = True
        with pytest.raises(ValueError, match="no such folder"):
            paired.add_lora(lora(path="/new", in_place=True))
        paired.fails = False
        self.refused(paired)
        with pytest.raises(Unsupported, match="may change at any step"):
            paired.steering.pair(adapters.identity(lora()), D)
        paired.add_lora(lora())
        paired.steering.pair(adapters.identity(lora()), D)

    def test_a_request_that_loads_in_place(self, paired: Any) -> None:
        """The ranks load when it runs, which may be after they were asked again."""
        paired.preprocess_add_request(request(digest=None, lora_request=lora(path="/new", in_place=True)))
        self.refused(paired)
        with pytest.raises(Unsupported, match="may change at any step"):
            paired.steering.pair(adapters.identity(lora()), D)
