from __future__ import annotations

import errno
import logging
import socket
import urllib.error
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from features.errors import EncoderError
from flows.tasks import may_pass, store_address
from pipeline.errors import DatasetError, StoreError


def http_error(status: int) -> Exception:
    return urllib.error.HTTPError("https://hub", status, "no", Message(), None)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class ReadTimeoutError(Exception):
    """As botocore has it: no OSError, told by its name and its module."""


ReadTimeoutError.__module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("peer"),
        TimeoutError("no answer"),
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.EIO, "Input/output error"),
        socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
        urllib.error.URLError("unreachable"),
        http_error(503),
        http_error(429),
        ReadTimeoutError("s3"),
        caused(RuntimeError("upload failed"), ConnectionResetError("peer")),
        caused(StoreError("out of reach"), TimeoutError("s3")),
    ],
    ids=repr,
)
def test_another_try_may_help_where_the_network_failed(error: Exception) -> None:
    assert may_pass(error)


@pytest.mark.parametrize(
    "error",
    [
        DatasetError("tables.items is empty"),
        caused(EncoderError("bring the file"), ConnectionError("no network")),
        StoreError("no such artefact"),
        caused(StoreError("no space is left"), OSError(errno.ENOSPC, "No space left on device")),
        FileNotFoundError(errno.ENOENT, "No such file"),
        PermissionError(errno.EACCES, "Permission denied"),
        FileNotFoundError("s3://bucket/key"),
        http_error(404),
        http_error(401),
        ValueError("a bug"),
        KeyError("connection"),
    ],
    ids=repr,
)
def test_another_try_cannot_help_with_a_mistake(error: Exception) -> None:
    assert not may_pass(error)


def test_an_error_that_causes_itself_ends_the_search() -> None:
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert not may_pass(first)


def test_prefect_s_stack_trace_of_a_person_s_mistake_is_dropped() -> None:
    def kept(error: Exception | None) -> bool:
        info: Any = (type(error), error, None) if error else None
        record = logging.LogRecord("prefect.flow_runs", logging.ERROR, "", 0, "failed", None, info)
        return bool(logging.getLogger("prefect.flow_runs").filter(record))

    assert not kept(DatasetError("tables.items is empty"))
    assert kept(ValueError("a bug"))
    assert kept(None)


def test_an_empty_store_means_that_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_STORE", str(tmp_path / "shop"))
    assert store_address("") == str(tmp_path / "shop")
    assert store_address("s3://bucket") == "s3://bucket"
