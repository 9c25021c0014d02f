"""A minimal reward server, standard library only: python docs/examples/reward_server.py [port]. Then

lockstep run reward_model=endpoint reward_model.url=http://127.0.0.1:8000/score '~stages.reward'
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def score(dialogue: list[dict[str, str]], response: str) -> float:
    """EDIT: one number for one response to a dialogue of {"role", "content"}. Here: short answers with a full stop."""
    return float(response.rstrip().endswith(".")) - 0.01 * len(response.split())


class RewardServer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        try:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scores = [score(*pair) for pair in zip(asked["prompts"], asked["responses"], strict=True)]
            self.answer(200, {"scores": scores})
        except (KeyError, TypeError, ValueError) as error:  # a bad request: a retry would not help
            self.answer(400, {"error": repr(error)})

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    port = int(sys.argv[1]) if sys.argv[1:] else 8000
    server = ThreadingHTTPServer(("127.0.0.1", port), RewardServer)
    print(f"http://127.0.0.1:{server.server_port}/score", flush=True)
    server.serve_forever()
