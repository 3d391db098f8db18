"""Lets vLLM's KV offloading run where there is no GPU: the copies between both tiers are made in host memory.

vLLM's connector, its keys, its manager and its eviction are its own; only the class that copies blocks, which needs
CUDA streams, is another. With this folder on PYTHONPATH it takes its place.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder

MODULE = "vllm.v1.kv_offload.cpu.spec"


class _HostCopies(MetaPathFinder):
    """Changes the module right after it has been executed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_change(module):
            execute(module)
            module.CPUOffloadingSpec.get_worker = lambda spec, caches: _worker(spec, caches)

        spec.loader.exec_module = execute_and_change
        return spec


def _worker(spec, caches):
    import torch
    from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult

    class Worker(OffloadingWorker):
        """One chunk is one block, and a copy is done when it is asked for."""

        def __init__(self):
            assert spec.blocks_per_chunk == 1
            self.device = [cache.tensor for cache in caches.tensors]
            self.host = [
                torch.zeros((spec.num_chunks, *tensor.shape[1:]), dtype=tensor.dtype) for tensor in self.device
            ]
            self.finished = []

        def submit_store(self, job_id, src_spec, dst_spec):
            return self._copy(job_id, self.device, src_spec, self.host, dst_spec)

        def submit_load(self, job_id, src_spec, dst_spec):
            return self._copy(job_id, self.host, src_spec, self.device, dst_spec)

        def _copy(self, job_id, sources, src_spec, targets, dst_spec):
            read, write = (torch.from_numpy(spec.block_ids).long() for spec in (src_spec, dst_spec))
            for source, target in zip(sources, targets, strict=True):
                target[write] = source[read]
            self.finished.append(TransferResult(job_id, True))
            return True

        def get_finished(self):
            done, self.finished = self.finished, []
            return done

        def wait(self, job_ids):
            pass

    return Worker()


sys.meta_path.insert(0, _HostCopies())
