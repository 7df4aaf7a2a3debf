"""The levers of a running engine, as `LLM` and `AsyncLLM` share them: weights, pauses, sleep."""

import abc
import asyncio
import time
from collections.abc import Iterable
from pathlib import Path

from jaxserve.core.control import PauseMode, WeightUpdate
from jaxserve.core.lora import LoRARequest
from jaxserve.engine.abstract_host import AbstractHost
from jaxserve.engine.weights import Names


class _Levers(abc.ABC):
    """What both faces do before they wait."""

    @property
    @abc.abstractmethod
    def _host(self) -> AbstractHost:
        """The engine of a decoder."""

    def get_weight_version(self) -> str:
        """Return the version of the weights being served; "0" until they are changed."""
        return self._host.lifecycle.weight_version

    def is_paused(self) -> bool:
        """Tell whether generation is paused."""
        return self._host.lifecycle.is_paused

    def is_sleeping(self) -> bool:
        """Tell whether weights, cache or scheduling are asleep."""
        return self._host.lifecycle.is_sleeping

    def list_loras(self) -> set[int]:
        """Return the numbers of the adapters that requests may use."""
        return {known.lora_int_id for known in self._host.adapters.requests()}

    def _add_lora(self, lora_request: LoRARequest) -> bool:
        host = self._host
        is_new = host.adapters.add(lora_request)
        if is_new:
            host.adapter_replaced(host.adapters.get(lora_request))
        return is_new

    def _remove_lora(self, lora_id: int) -> bool:
        host = self._host
        is_known = host.adapters.remove(lora_id) is not None
        host.unpin_adapter(lora_id)
        return is_known

    def _pin_lora(self, lora_id: int) -> bool:
        host = self._host
        adapter = host.adapters.get(host.adapters.known(lora_id))
        # First here: a replica that comes up meanwhile pins what is pinned here.
        is_new = host.adapters.pin(lora_id)
        try:
            host.pin_adapter(adapter)
        except BaseException:
            if is_new:
                host.adapters.unpin(lora_id)
            raise
        return True


class Controls(_Levers):
    """The levers of `LLM`; each call returns when what it asks for has been done."""

    def update_params(
        self,
        params: object,
        *,
        version: str | int | None = None,
        flush_cache: bool = True,
        recompute: bool = False,
        partial: bool = False,
        donate: bool = False,
        names: Names = "jaxserve",
    ) -> WeightUpdate:
        """Serve other weights from the next step on; nothing is compiled.

        Arrays whose dtype and sharding agree with those being served become the served ones,
        without a copy: do not donate or delete them while they serve. Others are cast and moved
        first. Either all is changed, or nothing.

        Args:
            params: An `nnx` module, an `nnx.State`, or a mapping of arrays, nested or by dotted
                path.
            version: What to call the weights; tokens are marked with it. None counts updates.
            flush_cache: Whether to forget the prefix cache, which the old weights have computed.
            recompute: Whether running requests compute their keys and values anew; otherwise they
                go on with those that the old weights have computed.
            partial: Whether weights may be left out; they stay as they are.
            donate: Whether the given arrays may be freed as soon as they have been cast or moved.
            names: `hf`: a flat mapping with the names and orientation of Hugging Face.

        Raises:
            ConfigError: Names every weight that is missing, unknown or of a wrong shape.
            RequestError: If the version is no good, or the options contradict each other.
            EngineDeadError: If the engine has stopped.
        """
        start = time.perf_counter()
        weights = self._host.prepare_weights(params, names, partial=partial, donate=donate)
        return self._host.lifecycle.update(
            weights, version=version, flush_cache=flush_cache, recompute=recompute, start=start
        ).result()

    def update_weights_from_disk(
        self,
        model_path: str | Path,
        *,
        version: str | int | None = None,
        flush_cache: bool = True,
        recompute: bool = False,
        abort_all_requests: bool = False,
    ) -> WeightUpdate:
        """Read a checkpoint of the same model, then serve it; see `update_params`.

        Args:
            model_path: A safetensors directory, a GGUF file, or a name.
            version: What to call the weights.
            flush_cache: Whether to forget the prefix cache.
            recompute: Whether running requests compute their keys and values anew.
            abort_all_requests: Whether to end what runs and waits, once the checkpoint has been
                read.

        Raises:
            ConfigError: If the checkpoint is damaged, missing, or of another model.
        """
        return self._host.update_from_disk(
            model_path,
            version=version,
            flush_cache=flush_cache,
            recompute=recompute,
            abort_all_requests=abort_all_requests,
        ).result()

    def update_weight_version(
        self, version: str | int, *, abort_all_requests: bool = False
    ) -> None:
        """Call the weights being served something else.

        Args:
            version: The new name.
            abort_all_requests: Whether to end what runs and waits.

        Raises:
            RequestError: If the version is no good.
        """
        self._host.lifecycle.rename(version, abort_all_requests=abort_all_requests).result()

    def pause_generation(self, mode: PauseMode = "abort", *, clear_cache: bool = True) -> None:
        """Pause generation until `resume_generation`.

        Args:
            mode: `abort` ends what runs and waits, `wait` lets it finish; both refuse new requests
                meanwhile. `keep` freezes everything, and new requests queue up.
            clear_cache: Whether to empty the prefix cache then; `keep` keeps it in any case.

        Raises:
            RequestError: If there is no such mode, or requests would have to finish while asleep.
        """
        self._host.lifecycle.pause(mode, clear_cache=clear_cache).result()

    def resume_generation(self) -> None:
        """Go on after `pause_generation`.

        Raises:
            RequestError: While weights or cache are asleep.
        """
        self._host.lifecycle.resume().result()

    def sleep(self, level: int = 1, mode: PauseMode = "abort") -> None:
        """Pause, and give memory back until `wake_up`.

        Args:
            level: 0 pauses only. 1 moves the weights to host memory and frees the cache. 2 frees
                both; weights must then come by `update_params`.
            mode: What becomes of requests; see `pause_generation`.

        Raises:
            RequestError: If there is no such level or mode.
        """
        self._host.lifecycle.sleep(level, mode).result()

    def wake_up(self, tags: Iterable[str] | None = None) -> bool:
        """Undo `sleep`, wholly or in part; nothing is compiled.

        Args:
            tags: Parts to wake: `weights`, `kv_cache`, `scheduling`; None is all.

        Returns:
            Whether all is awake.

        Raises:
            RequestError: If there is no such part, or scheduling would go on without the others.
        """
        return self._host.lifecycle.wake_up(tags).result()

    def reset_prefix_cache(self, *, reset_running_requests: bool = False) -> bool:
        """Empty the prefix cache.

        Args:
            reset_running_requests: Whether running requests are recomputed from nothing as well.

        Returns:
            True, once it is empty.
        """
        future = self._host.lifecycle.reset_prefix_cache(
            reset_running_requests=reset_running_requests
        )
        return future.result()

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Read an adapter, so that the first request that names it need not wait.

        With `load_inplace` it takes the place of an older one of the same name and number;
        requests that use that one finish with it.

        Args:
            lora_request: The adapter.

        Returns:
            Whether it was read; False if it was there already.

        Raises:
            RequestError: If adapters are switched off, or name and number are those of others.
            ConfigError: If it is damaged, missing, or does not fit the model; names what is wrong.
        """
        return self._add_lora(lora_request)

    def remove_lora(self, lora_id: int) -> bool:
        """Forget an adapter; requests that use it finish with it.

        Args:
            lora_id: Its `lora_int_id`.

        Returns:
            Whether there was such an adapter.
        """
        return self._remove_lora(lora_id)

    def pin_lora(self, lora_id: int) -> bool:
        """Bring an adapter onto the device, and keep its slot for it until it is removed.

        Args:
            lora_id: Its `lora_int_id`.

        Returns:
            True, once it is there.

        Raises:
            RequestError: If there is no such adapter, or no slot would be left for others.
        """
        return self._pin_lora(lora_id)

    def start_profile(self, folder: str | Path | None = None) -> Path:
        """Begin a trace of host and device.

        Args:
            folder: Where it goes; None makes a new one for temporary files.

        Returns:
            The folder.

        Raises:
            RequestError: If a trace is being recorded already.
        """
        return self._host.profiler.start(folder)

    def stop_profile(self) -> Path:
        """End the trace and write it.

        Returns:
            The folder.

        Raises:
            RequestError: If no trace is being recorded.
        """
        return self._host.profiler.stop()


class AsyncControls(_Levers):
    """The levers of `AsyncLLM`: those of `Controls`, without blocking the event loop."""

    async def update_params(
        self,
        params: object,
        *,
        version: str | int | None = None,
        flush_cache: bool = True,
        recompute: bool = False,
        partial: bool = False,
        donate: bool = False,
        names: Names = "jaxserve",
    ) -> WeightUpdate:
        """Serve other weights from the next step on; see `Controls.update_params`."""
        start = time.perf_counter()
        weights = await asyncio.to_thread(
            self._host.prepare_weights, params, names, partial=partial, donate=donate
        )
        return await asyncio.wrap_future(
            self._host.lifecycle.update(
                weights, version=version, flush_cache=flush_cache, recompute=recompute, start=start
            )
        )

    async def update_weights_from_disk(
        self,
        model_path: str | Path,
        *,
        version: str | int | None = None,
        flush_cache: bool = True,
        recompute: bool = False,
        abort_all_requests: bool = False,
    ) -> WeightUpdate:
        """Read a checkpoint, then serve it; see `Controls.update_weights_from_disk`."""
        future = await asyncio.to_thread(
            self._host.update_from_disk,
            model_path,
            version=version,
            flush_cache=flush_cache,
            recompute=recompute,
            abort_all_requests=abort_all_requests,
        )
        return await asyncio.wrap_future(future)

    async def update_weight_version(
        self, version: str | int, *, abort_all_requests: bool = False
    ) -> None:
        """Call the weights something else; see `Controls.update_weight_version`."""
        await asyncio.wrap_future(
            self._host.lifecycle.rename(version, abort_all_requests=abort_all_requests)
        )

    async def pause_generation(
        self, mode: PauseMode = "abort", *, clear_cache: bool = True
    ) -> None:
        """Pause generation; see `Controls.pause_generation`."""
        await asyncio.wrap_future(self._host.lifecycle.pause(mode, clear_cache=clear_cache))

    async def resume_generation(self) -> None:
        """Go on after `pause_generation`; see `Controls.resume_generation`."""
        await asyncio.wrap_future(self._host.lifecycle.resume())

    async def sleep(self, level: int = 1, mode: PauseMode = "abort") -> None:
        """Pause, and give memory back; see `Controls.sleep`."""
        await asyncio.wrap_future(self._host.lifecycle.sleep(level, mode))

    async def wake_up(self, tags: Iterable[str] | None = None) -> bool:
        """Undo `sleep`, wholly or in part; see `Controls.wake_up`."""
        return await asyncio.wrap_future(self._host.lifecycle.wake_up(tags))

    async def reset_prefix_cache(self, *, reset_running_requests: bool = False) -> bool:
        """Empty the prefix cache; see `Controls.reset_prefix_cache`."""
        return await asyncio.wrap_future(
            self._host.lifecycle.reset_prefix_cache(reset_running_requests=reset_running_requests)
        )

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Read an adapter; see `Controls.add_lora`."""
        return await asyncio.to_thread(self._add_lora, lora_request)

    async def remove_lora(self, lora_id: int) -> bool:
        """Forget an adapter; see `Controls.remove_lora`."""
        return await asyncio.to_thread(self._remove_lora, lora_id)

    async def pin_lora(self, lora_id: int) -> bool:
        """Keep an adapter on the device; see `Controls.pin_lora`."""
        return await asyncio.to_thread(self._pin_lora, lora_id)

    async def start_profile(self, folder: str | Path | None = None) -> Path:
        """Begin a trace; see `Controls.start_profile`."""
        return await asyncio.to_thread(self._host.profiler.start, folder)

    async def stop_profile(self) -> Path:
        """End the trace; see `Controls.stop_profile`."""
        return await asyncio.to_thread(self._host.profiler.stop)
