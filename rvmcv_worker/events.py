"""The names of what is logged: stable words by which ops and programs find an event."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from loguru import logger

if TYPE_CHECKING:
    from loguru import Logger


class Event(str, enum.Enum):
    """What has happened; a name never comes to mean another thing. docs/events.md tells what to do."""

    WORKER_STARTED = "worker.started"  #: the daemon is up; its line says what it claims and behind which wall
    WORKER_NOT_STARTED = "worker.not_started"  #: the daemon cannot begin; the line says what is wrong
    WORKER_STOPPING = "worker.stopping"  #: a signal asked it to stop
    WORKER_STOPPED = "worker.stopped"  #: the last line of an orderly end
    WORKER_DIED = "worker.died"  #: a thread or the process met a fault of its own and the daemon ends
    WORKER_FAULT = "worker.fault"  #: a fault of the worker's own which it survives; the exception follows
    WORKER_PAUSED = "worker.paused"  #: the operator's wish: nothing is claimed, running jobs go on
    WORKER_DRAINED = "worker.drained"  #: the operator's wish: no claims, running jobs are handed back
    WORKER_RESUMED = "worker.resumed"  #: the operator's wish: it claims again
    WORKER_WISH_LOST = "worker.wish_lost"  #: the operator's wish could not be read, or not be written down
    WORKER_SUPERSEDED = "worker.superseded"  #: a second daemon runs under the same worker id

    JOB_CLAIMED = "job.claimed"  #: RVM-Server gave a job to this worker
    JOB_CLAIM_REFUSED = "job.claim_refused"  #: RVM-Server said no to a claim: another worker was faster
    JOB_CLAIM_WAITS = "job.claim_waits"  #: a claim is not answered, or cannot be written down
    JOB_WAITS_FOR_GPUS = "job.waits_for_gpus"  #: the job is next and needs more GPUs than are free
    JOB_MALFORMED = "job.malformed"  #: RVM-Server offers a job that is not as the protocol says
    JOB_OPTION_IGNORED = "job.option_ignored"  #: a value of the job's config that the worker does not follow
    JOB_PROGRESS = "job.progress"  #: a new phase, and how far it is once a minute; not of inferences
    JOB_CONTINUED = "job.continued"  #: it goes on from the checkpoint of an earlier attempt
    JOB_STARTED_OVER = "job.started_over"  #: the checkpoint of an earlier attempt is of no use
    JOB_CHECKPOINT_STORED = "job.checkpoint_stored"  #: the newest checkpoint is in storage
    JOB_CHECKPOINT_LOST = "job.checkpoint_lost"  #: a checkpoint is not in storage
    JOB_MEMORY_SHORT = "job.memory_short"  #: the GPU's memory was too small: it goes on with a smaller batch
    JOB_INCOMPLETE = "job.incomplete"  #: the job goes on without a part of its result
    JOB_WAITS = "job.waits"  #: what must reach RVM-Server before the job goes on does not
    JOB_COMPLETED = "job.completed"  #: it is done; the final report follows
    JOB_FAILED = "job.failed"  #: it has failed; the line says by what code
    JOB_HANDED_BACK = "job.handed_back"  #: it goes back to the queue and is run again
    JOB_CANCEL_ASKED = "job.cancel_asked"  #: the operator wants the job to end
    JOB_CANCELLED = "job.cancelled"  #: RVM-Server or the operator cancelled it
    JOB_FENCED = "job.fenced"  #: its lease was lost: it is another's or over
    JOB_LEFT_BEHIND = "job.left_behind"  #: it could not be brought to an end now: it is handed back later

    REPORT_ACCEPTED = "report.accepted"  #: RVM-Server took the final report: the job is over for the worker
    REPORT_WAITS = "report.waits"  #: final reports cannot be delivered now
    REPORT_UNWANTED = "report.unwanted"  #: the job is over or another's: the result is discarded
    REPORT_REFUSED = "report.refused"  #: RVM-Server takes the final report for wrong; the file is kept
    REPORT_GIVEN_UP = "report.given_up"  #: seven days without an answer, or it cannot be read any more

    MODEL_UPLOADED = "model.uploaded"  #: RVM-Server has the trained model, byte for byte
    MODEL_UPLOAD_WAITS = "model.upload_waits"  #: RVM-Server does not take the trained model now
    MODEL_SENT_AS_FILE = "model.sent_as_file"  #: RVM-Server takes models by their bytes alone
    MODEL_FROM_STORE = "model.from_store"  #: RVM-Server is away: the model was in the worker's own store

    ENGINE_STARTED = "engine.started"  #: an inference engine starts
    ENGINE_STOPPED = "engine.stopped"  #: an inference engine had nothing to do and ended
    ENGINE_REPLACED = "engine.replaced"  #: an inference engine failed and another one takes its place
    ENGINE_FAILED = "engine.failed"  #: no inference engine can be started
    ENGINE_BACKEND_CHOSEN = "engine.backend_chosen"  #: what runs a model fastest was measured
    ENGINE_BACKEND_DROPPED = "engine.backend_dropped"  #: a faster form of a model is of no use: torch runs it

    SERVER_UNREACHABLE = "server.unreachable"  #: RVM-Server does not answer, or not as it should
    SERVER_REACHABLE = "server.reachable"  #: RVM-Server answers again
    SERVER_TOO_OLD = "server.too_old"  #: RVM-Server lacks a part of the protocol
    TOKEN_REJECTED = "token.rejected"  #: RVM-Server does not take the worker's token
    TOKEN_RELOADED = "token.reloaded"  #: the token was read again
    TOKEN_UNREADABLE = "token.unreadable"  #: the token cannot be read; the one before stays in force

    DISK_SHORT = "disk.short"  #: the disk has too little room to claim
    DISK_FREE = "disk.free"  #: the disk has room again
    GPU_UNFIT = "gpu.unfit"  #: a GPU, or all of them, takes no jobs
    GPU_FIT = "gpu.fit"  #: a GPU takes jobs again
    STORAGE_MISSING = "storage.missing"  #: there is no place for results
    STORAGE_FOUND = "storage.found"  #: there is a place for results now
    WALL_MISSING = "wall.missing"  #: jobs cannot be walled in, and nothing is claimed
    WALL_OPEN = "wall.open"  #: jobs run without a wall, or with a lower one

    STORE_TRIMMED = "store.trimmed"  #: models were removed from the store to stay below its limit
    STORE_DAMAGED = "store.damaged"  #: a file of the model store is not what it should be, and is removed
    LEDGER_SET_ASIDE = "ledger.set_aside"  #: the ledger cannot be read: an empty one takes its place
    LEDGER_UPGRADED = "ledger.upgraded"  #: the ledger is of another version of the worker
    LEFTOVERS_REMOVED = "leftovers.removed"  #: files or processes of the daemon before were removed
    LEFTOVERS_KEPT = "leftovers.kept"  #: a job's files could not be removed
    SETTLEMENT_WAITS = "settlement.waits"  #: jobs of the daemon before cannot be handed back now
    HEALTH_REFUSED = "health.refused"  #: the health socket did not serve a client
    LIBRARY_WARNED = "library.warned"  #: a library has something to say
    METRICS_UNWRITTEN = "metrics.unwritten"  #: the file for node_exporter cannot be written; jobs go on
    METRICS_WRITTEN = "metrics.written"  #: the file for node_exporter is written again


def event(name: Event, job_id: str | None = None, **details: str | float | None) -> Logger:
    """Return a logger whose lines carry the event's name and, where given, the job that it is about.

    `details` are for programs: JSON has them by their names, the journal as ``RVMCV_<NAME>``.
    """
    bound = logger.bind(event=name.value, **({"details": details} if details else {}))
    return bound if job_id is None else bound.bind(job_id=job_id)
