"""As much of a W&B server as W&B's client needs to record a run: GraphQL and the stream of history rows, on a loopback port.

It answers what wandb 0.31 asks, as seen from outside; it is here to see what is sent and declared, not to be W&B.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "p", "internalId": "1", "name": "lockstep", "entity": {"id": "e", "name": "me"}}
THEN = "2026-01-01T00:00:00Z"


@dataclass
class Record:
    """What the server has been told."""

    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)  # the id is the index
    used: list[tuple[str, str]] = field(default_factory=list)  # (run, artifact)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)


class Server:
    """``with Server() as server``: listens at ``server.address`` and fills ``server.record``."""

    def __init__(self) -> None:
        self.record = Record()

    def __enter__(self) -> Server:
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"server_state": self}))
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        return getattr(self, operation)(variables)

    # ----------------------------------------------------------------------------------------------------------- runs

    def Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}}

    def ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def RunResumeStatus(self, v: dict[str, Any]) -> dict[str, Any]:
        run, rows = self.record.runs.get(v["name"]), self.record.history.get(v["name"], [])
        bucket = run and {
            "id": v["name"], "name": v["name"], "summaryMetrics": json.dumps(rows[-1] if rows else {}), "displayName": None,
            "logLineCount": 0, "historyLineCount": len(rows), "eventsLineCount": 0, "config": run["config"], "tags": [],
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "eventsTail": "[]", "wandbConfig": '{"t": {}}',
        }  # fmt: skip
        return {"model": {"id": "p", "name": "lockstep", "entity": PROJECT["entity"], "bucket": bucket}}

    def UpsertBucket(self, v: dict[str, Any]) -> dict[str, Any]:
        known = self.record.runs.setdefault(v["name"], {})
        known.update({key: value for key, value in v.items() if value is not None})
        bucket = {"id": v["name"], "name": v["name"], "displayName": v["displayName"], "description": "", "config": v["config"]}
        lines = len(self.record.history.get(v["name"], []))
        return {
            "upsertBucket": {
                "bucket": {**bucket, "sweepName": "", "project": PROJECT, "historyLineCount": lines},
                "inserted": len(known) == 0,
            }
        }

    def CreateRunFiles(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}

    def NotifyScriptableRunAlert(self, v: dict[str, Any]) -> dict[str, Any]:
        self.record.alerts.append(v)
        return {"notifyScriptableRunAlert": {"success": True}}

    def stream(self, run: str, files: dict[str, Any]) -> None:
        rows = files.get("wandb-history.jsonl", {}).get("content", [])
        self.record.history.setdefault(run, []).extend(map(json.loads, rows))

    # ------------------------------------------------------------------------------------------------------ artifacts

    def CreateArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        self.record.artifacts.append({**v["input"], "committed": False})
        created = {"id": str(len(self.record.artifacts) - 1), "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": created}}

    def CreateArtifactManifest(self, _: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "f", "uploadUrl": f"{self.address}/upload/manifest", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def CreateArtifactFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "storagePath": f["name"], "uploadUrl": f"{self.address}/upload/{f['name']}", "uploadHeaders": [],
                "uploadMultipartUrls": None, "artifact": {"id": f["artifactID"]},
            }
            for f in v["input"]["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def CommitArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        self.record.artifacts[int(v["artifactID"])]["committed"] = True
        return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": "d"}}}

    def ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def ArtifactMembershipByName(self, v: dict[str, Any]) -> dict[str, Any]:
        name, _, alias = v["name"].partition(":")
        found = [i for i, a in enumerate(self.record.artifacts) if name == a["artifactCollectionName"] and alias in aliases(a)]
        return {"project": {"artifactCollectionMembership": self._membership(found[-1], name, alias) if found else None}}

    def _membership(self, number: int, name: str, alias: str) -> dict[str, Any]:
        collection = {"__typename": "ArtifactSequence", "name": name, "project": PROJECT}
        marks = [{"__typename": "ArtifactAlias", "id": "a", "alias": alias, "artifactCollection": collection}]
        artifact = {
            "__typename": "Artifact", "id": str(number), "artifactSequence": collection, "versionIndex": 0, "aliases": marks,
            "artifactType": {"name": self.record.artifacts[number]["artifactTypeName"]}, "description": None, "metadata": "{}",
            "ttlDurationSeconds": -1, "ttlIsInherited": True, "tags": [], "historyStep": None, "state": "COMMITTED", "size": 1,
            "digest": "d", "commitHash": "c", "fileCount": 1, "createdAt": THEN, "updatedAt": None,
        }  # fmt: skip
        membership = {"__typename": "ArtifactCollectionMembership", "id": "m", "versionIndex": 0, "createdAt": THEN}
        return {**membership, "aliases": marks, "artifactCollection": collection, "artifact": artifact}

    def UseArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        self.record.used.append((v["runName"], self.record.artifacts[int(v["artifactID"])]["artifactCollectionName"]))
        known = {"id": v["artifactID"], "digest": "d", "description": None, "state": "COMMITTED", "createdAt": THEN}
        return {"useArtifact": {"artifact": {**known, "metadata": "{}"}}}


def aliases(artifact: dict[str, Any]) -> set[str]:
    return {alias["alias"] for alias in artifact["aliases"]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: Server

    def do_POST(self) -> None:
        sent = json.loads(self._body())
        if self.path == "/graphql":
            operation = re.search(r"(?:query|mutation) (\w+)", sent["query"])[1]
            self._reply({"data": self.server_state.answer(operation, sent.get("variables") or {})})
        else:
            self.server_state.stream(self.path.split("/")[-2], sent.get("files") or {})
            self._reply({"exitcode": None, "limits": {}})

    def do_PUT(self) -> None:
        self.server_state.record.uploads[self.path.removeprefix("/upload/")] = self._body()
        self._reply({})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _chunk(self) -> bytes:
        chunk = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return chunk

    def _reply(self, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass
