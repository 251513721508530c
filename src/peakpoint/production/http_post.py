"""One POST in a process apart, which can be ended whatever it waits for; see ``production.subprocess_runner``."""

import http.client
import urllib.error
import urllib.request
from typing import Any

import msgspec

from peakpoint.production.subprocess_runner import Ends


class Post(msgspec.Struct):
    """What to send.

    Attributes:
        url: where to.
        body: a JSON text.
    """

    url: str
    body: str


class _Straight(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: what comes of it is a GET, which leaves behind what is to be told."""

    def redirect_request(self, *_: object) -> None:
        """None: the answer that redirects is an error."""


def main(ends: list[Any]) -> None:
    """Send what the job says, and say why it was not taken, or null.

    Args:
        ends: see ``peakpoint.production.subprocess_runner``.
    """
    pipes = Ends(ends)
    pipes.say(msgspec.json.encode(_send(msgspec.json.decode(pipes.job(), type=Post))))


def _send(post: Post) -> str | None:
    request = urllib.request.Request(  # noqa: S310 - the policy takes http and https only
        post.url, data=post.body.encode(), headers={"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.build_opener(_Straight).open(request):
            return None
    except urllib.error.HTTPError as error:
        with error:
            return f"it answered {error.code} {error.reason}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        # no connection, a reset, an address that is none, an answer that is no HTTP
        return f"it cannot be reached: {getattr(error, 'reason', None) or error}"
