"""Time for tests: instead of waiting, make everything in a namespace older."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from presence.scripts import lua_folder
from tests.invariants import key_pattern

if TYPE_CHECKING:
    import redis

# Every time that a namespace stores moves into the past, and every TTL gets shorter by as much, in one script: to the
# operations, which read the server's clock, that is the same as if the time had passed.
_AGE = """
local prefix, milliseconds = ARGV[1], tonumber(ARGV[2])
local function earlier(text, units)
  return text == '' and '' or string.format('%d', tonumber(text) - milliseconds * units)
end
local function earlier_record(record)
  local game_id, user_id, server, epoch, connected_at, heartbeat_at, metadata = split_record(record)
  epoch, connected_at, heartbeat_at = earlier(epoch, 1000), earlier(connected_at, 1), earlier(heartbeat_at, 1)
  return make_record(game_id, make_body(user_id, epoch, connected_at, heartbeat_at, server, metadata))
end
for _, key in ipairs(redis.call('KEYS', ARGV[3])) do
  local kind = key:sub(#prefix + 1):match('^[a-z_]+')
  if kind == 'conn' then
    redis.call('SET', key, earlier_record(redis.call('GET', key)), 'KEEPTTL')
  elseif kind == 'user_conns' then
    -- Only the time that the kept answer begins with is looked at before it is given again.
    local list = redis.call('GET', key)
    local sids, kept_at = split_sids(list)
    if kept_at <= #list then
      local token_and_time = '<c' .. token_length .. 'd'
      local token, answered_at, rest = struct.unpack(token_and_time, list, kept_at)
      local aged = struct.pack(token_and_time, token, answered_at - milliseconds * 1000)
      redis.call('SET', key, make_sids(sids, aged .. list:sub(rest)), 'KEEPTTL')
    end
  elseif kind == 'game_conns' then
    local members = redis.call('HGETALL', key)
    for index = 1, #members, 2 do
      redis.call('HSET', key, members[index], body_of(earlier_record('0:' .. members[index + 1])))
    end
  elseif kind == 'last_seen' or kind == 'servers' then
    local scores = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
    for index = 1, #scores, 2 do
      local member, score = scores[index], scores[index + 1]
      -- The empty sid's is minus the last epoch; a detached connection's is minus a time; a dead server's is none.
      local units = member == '' and -1000 or tonumber(score) < 0 and -1 or score == '0' and 0 or 1
      redis.call('ZADD', key, earlier(score, units), member)
    end
  end
  redis.call('PEXPIRE', key, math.max(0, redis.call('PTTL', key) - milliseconds))
end
"""


@cache
def _script() -> str:
    """Put what the operations' own scripts know of the layout before it."""
    includes = ("token_length", "split_record", "body_of", "make_record", "make_body", "split_sids", "make_sids")
    texts = [(lua_folder() / "include" / f"{name}.lua").read_text(encoding="utf-8") for name in includes]
    return "".join(texts) + _AGE


def let_time_pass(client: redis.Redis, namespace: str, seconds: float) -> None:
    """Make a namespace older by so many seconds."""
    prefix = f"{{{namespace}}}:"
    client.eval(_script(), 0, prefix, str(round(seconds * 1000)), key_pattern(prefix))
