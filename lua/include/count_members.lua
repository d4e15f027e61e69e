-- @include as_argument
-- @include last_seen_scores
-- Count the members of a game that are live and, if asked for, those that are detached and within their grace.
-- Of a game that is not small these are all but those that are among the namespace's connections that do not count,
-- of which cleanups leave few, beside the detached ones. To ask for the score of each member takes 1 to 2 us.
local function count_members(game_conns_key, last_seen_key, are_detached_asked_for, now, conn_ttl_ms)
  local oldest_live = now - conn_ttl_ms
  local size = redis.call('HLEN', game_conns_key)
  if size > 50 then
    local limit = math.min(size, 1000)
    local first, last = are_detached_asked_for and '(-' .. now or '-inf', '(' .. as_argument(oldest_live)
    local others = redis.call('ZRANGE', last_seen_key, first, last, 'BYSCORE', 'LIMIT', 0, limit)
    if #others < limit then
      for _, body in ipairs(#others > 0 and redis.call('HMGET', game_conns_key, unpack(others)) or {}) do
        size = size - (body and 1 or 0)
      end
      return size
    end
  end
  local count = 0
  for _, score in ipairs(last_seen_scores(last_seen_key, redis.call('HKEYS', game_conns_key))) do
    local seen = score and tonumber(score)
    if seen and (seen >= oldest_live or (are_detached_asked_for and -seen >= tonumber(now))) then
      count = count + 1
    end
  end
  return count
end
