"""One POST in another process, which can be ended whatever it waits for; see ``production.subprocess_runner``."""

import http.client
import urllib.error
import urllib.request
from typing import Any

import msgspec

from peakpoint.production.subprocess_runner import Ends


class Post(msgspec.Struct):
    """A JSON text to send."""

    url: str
    body: str


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: it would become a GET, which leaves the body behind."""

    def redirect_request(self, *_: object) -> None:
        """None: the answer that redirects is an error."""


def main(ends: list[Any]) -> None:
    """Send the job, and then why it was not accepted, or null."""
    pipes = Ends(ends)
    pipes.send(msgspec.json.encode(_send(msgspec.json.decode(pipes.job(), type=Post))))


def _send(post: Post) -> str | None:
    request = urllib.request.Request(  # noqa: S310 - the policy takes http and https only
        post.url, data=post.body.encode(), headers={"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.build_opener(_NoRedirects).open(request):
            return None
    except urllib.error.HTTPError as error:
        with error:
            return f"it answered {error.code} {error.reason}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        # no connection, a reset, a bad address, an answer that is not HTTP
        return f"it cannot be reached: {getattr(error, 'reason', None) or error}"
