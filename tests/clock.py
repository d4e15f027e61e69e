"""Time for tests: instead of waiting, make everything in a namespace older."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import redis

# Every time that a namespace stores moves into the past, and every TTL gets shorter by as much, in one script: to the
# operations, which read the server's clock, that is the same as if the time had passed.
_AGE = """
local prefix, milliseconds = ARGV[1], tonumber(ARGV[2])
local function earlier(text, units)
  return string.format('%d', tonumber(text) - milliseconds * units)
end
for _, key in ipairs(redis.call('KEYS', ARGV[3] .. '*')) do
  local kind = string.match(string.sub(key, #prefix + 1), '^[a-z_]+')
  if kind == 'conn' then
    redis.call('HSET', key, 'connected_at', earlier(redis.call('HGET', key, 'connected_at'), 1))
  elseif kind == 'game_conns' then
    local members = redis.call('HGETALL', key)
    for index = 1, #members, 2 do
      local registered_at, connected_at, user_id = string.match(members[index + 1], '^(%d+)(:?%d*) (.*)$')
      if connected_at ~= '' then
        connected_at = ':' .. earlier(string.sub(connected_at, 2), 1)
      end
      redis.call('HSET', key, members[index], earlier(registered_at, 1000) .. connected_at .. ' ' .. user_id)
    end
  else
    local scores = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
    for index = 1, #scores, 2 do
      redis.call('ZADD', key, earlier(scores[index + 1], kind == 'user_conns' and 1000 or 1), scores[index])
    end
  end
  redis.call('PEXPIRE', key, redis.call('PTTL', key) - milliseconds)
end
"""


def let_time_pass(client: redis.Redis, namespace: str, seconds: float) -> None:
    """Make a namespace older by so many seconds."""
    prefix = f"{{{namespace}}}:"
    pattern = "".join(f"\\{character}" if character in "*?[]\\^-" else character for character in prefix)
    client.eval(_AGE, 0, prefix, str(round(seconds * 1000)), pattern)
