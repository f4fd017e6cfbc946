"""Which devices an artifact for an app fits on, for the report; loaded only where there is one."""

from __future__ import annotations

from collections.abc import Sequence

from compress.decoder.footprint import (
    devices,
    embedding_bytes,
    footprint,
    judge,
    largest_context,
    realistic_tokens_per_second,
)
from compress.formats import get_format
from compress.plan.job import Job
from compress.plan.shapes import Artifact
from compress.report.report import DeviceReport, Report


def add_devices(report: Report, artifacts: Sequence[Artifact], job: Job) -> None:
    """Add ``activation_bytes`` and ``devices`` to the artifacts of formats for apps.

    Args:
        report: of the build.
        artifacts: in the report's order.
        job: of the build.
    """
    for entry, artifact in zip(report.artifacts, artifacts, strict=True):
        row, plan = get_format(artifact.format), artifact.plan
        if not row.app:
            continue
        need = footprint(
            job.shape,
            plan.weights_bytes,
            embedding_bytes(job.shape, plan.entries),
            job.context,
            plan.kv_bytes_per_value,
            prompt_call=row.prompt_call,
            outside=plan.weights_outside,
        )
        entry.activation_bytes, entry.weights_outside = need.activations, need.outside
        entry.devices = [
            DeviceReport(
                name=device.name,
                label=device.label,
                app_limit_bytes=device.app_limit,
                entitled_bytes=device.entitled,
                limits_measured=device.limits_measured,
                verdict=judge(need, device),
                largest_context=largest_context(job.shape, need, device.entitled),
                tokens_per_second=[
                    round(speed, 1) for speed in realistic_tokens_per_second(need, device)
                ],
            )
            for device in devices().values()
        ]
