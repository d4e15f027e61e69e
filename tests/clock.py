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
    for field, units in pairs({epoch = 1000, connected_at = 1, last_seen = 1}) do
      local time = redis.call('HGET', key, field)
      if time then
        redis.call('HSET', key, field, earlier(time, units))
      end
    end
  elseif kind == 'game_conns' then
    local members = redis.call('HGETALL', key)
    for index = 1, #members, 2 do
      local epoch, times, user_id = string.match(members[index + 1], '^(%d+)([:%d]*) (.*)$')
      times = string.gsub(times, '%d+', function(time) return earlier(time, 1) end)
      redis.call('HSET', key, members[index], earlier(epoch, 1000) .. times .. ' ' .. user_id)
    end
  elseif kind == 'epoch' then
    redis.call('SET', key, earlier(redis.call('GET', key), 1000), 'KEEPTTL')
  elseif kind ~= 'reply' then
    local scores = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
    for index = 1, #scores, 2 do
      local score = scores[index + 1]
      -- A detached connection's score is minus a time.
      local units = kind == 'user_conns' and 1000 or tonumber(score) < 0 and -1 or 1
      redis.call('ZADD', key, earlier(score, units), scores[index])
    end
  end
  redis.call('PEXPIRE', key, math.max(0, redis.call('PTTL', key) - milliseconds))
end
"""


def let_time_pass(client: redis.Redis, namespace: str, seconds: float) -> None:
    """Make a namespace older by so many seconds."""
    prefix = f"{{{namespace}}}:"
    pattern = "".join(f"\\{character}" if character in "*?[]\\^-" else character for character in prefix)
    client.eval(_AGE, 0, prefix, str(round(seconds * 1000)), pattern)
