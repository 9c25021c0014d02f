"""A server that speaks the part of vLLM's HTTP that Lockstep uses, over a small policy on torch. Its sampler is the backend's
own, as that of a server with `lockstep_vllm.processor` is; or, without it, one that draws from vLLM's seed."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from conftest import BACKENDS
from lockstep.config.schema import parse
from lockstep.registry import registry
from lockstep_vllm.server import PROBE, Server, ServerConfig


class FakeVLLM:
    """``spoil(answer)`` changes what is answered to a request for tokens; a number is sent as the status of an error. Requests to
    paths in ``silent`` are never answered. While it is paused, requests for tokens wait. ``loads`` are the versions it was given,
    ``draws`` the requests for tokens, ``asked`` the paths of all requests."""

    def __init__(self, *, processor=True, mode="processed_logits"):
        cls = registry().resolve("backend", "torch", "torch")
        self.backend = cls(parse(cls.Config, BACKENDS["torch"], "backend"))
        self.processor, self.mode = processor, mode
        self.policy, self.version, self.silent, self.asked = None, "default", (), []
        self.running = threading.Event()
        self.running.set()
        self.loads, self.draws, self.spoil, self.seconds, self.missing = [], [], lambda answer: answer, 0.0, ()
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
                path = self.path.partition("?")[0]
                outer.asked.append(path)
                if path in outer.silent:
                    threading.Event().wait()
                answer = 404 if path in outer.missing else outer.answer(path, body)
                status, content = (answer, b"no") if isinstance(answer, int) else (200, answer)
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, *_):
                pass

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    @property
    def paused(self):
        return not self.running.is_set()

    def answer(self, path, body):
        match path:
            case "/pause":
                self.running.clear()
                return {}
            case "/resume":
                self.running.set()
                return {}
            case "/update_weight_version":
                self.version = body["new_version"]
                self.loads += [] if self.version == "loading" else [self.version]
                return {}
            case "/collective_rpc":
                assert self.paused
                folder = Path(body["kwargs"].get("folder") or body["kwargs"]["weights_path"])
                assert body["method"] == ("lockstep_load" if "folder" in body["kwargs"] else "reload_weights")
                self.policy = registry().resolve("policy", "decoder", "torch").load(folder, self.backend)
                return {"results": [None]}
            case "/inference/v1/generate":
                self.running.wait()
                time.sleep(self.seconds)
                self.draws.append(body)
                return self.spoil(self.draw(body["token_ids"], body["sampling_params"]))
        return 404

    def draw(self, prompt, asked):
        with self.lock:
            tokens, logprobs = self.tokens(prompt, asked)
        content = [{"token_id": t, "logprob": p, "rank": 1, "top_logprobs": []} for t, p in zip(tokens, logprobs, strict=True)]
        spans = [{"version": self.version, "start": 0, "end": len(tokens)}]
        return {"choices": [{"index": 0, "token_ids": tokens, "logprobs": {"content": content}, "weight_versions": spans}]}

    def tokens(self, prompt, asked):
        assert asked["ignore_eos"] and asked["logprobs"] == 0
        own = asked.get("extra_args", {}).get("lockstep") if self.processor else None
        if own is not None and own.get("probe"):
            return [0], [PROBE if self.mode == "processed_logits" else 0.0]
        if (bias := asked.get("logit_bias")) is not None:
            ((token, value),) = bias.items()
            return [int(token)], [{"processed_logprobs": -1e-9, "processed_logits": value, "raw_logprobs": -3.0}[self.mode]]
        if self.policy is None:  # that it was started with, which nobody compares
            return [0] * asked["max_tokens"], [-1.0] * asked["max_tokens"]
        seeds = np.array(own["seeds"], np.uint32) if own else draws(asked.get("seed", 0), asked["max_tokens"])
        temperature = own["temperature"] if own else asked["temperature"]
        given = np.array([prompt], np.int32), np.ones((1, len(prompt)), bool), seeds[None]
        found = self.policy.generate(*given, temperature=temperature, stop_ids=asked["stop_token_ids"], pad_id=0)
        return found.tokens[found.mask].tolist(), found.logprobs[found.mask].tolist()


def draws(seed, count):
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)


def client(url, *, sampler="lockstep", ahead=False, **server):
    return Server(Server.Config(ahead=ahead, sampler=sampler, server=ServerConfig(url=url, **server)))
