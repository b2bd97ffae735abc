"""A Ray cluster for the tests, in a process of its own: prints its address, ends when standard input does."""

import sys

from pipeline.runtime import prepare_local_ray


def main() -> None:
    prepare_local_ray()
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=80 << 20,
        log_to_driver=False,
        _temp_dir=sys.argv[1],
    )
    print(ray.get_runtime_context().gcs_address, flush=True)  # noqa: T201
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main()
