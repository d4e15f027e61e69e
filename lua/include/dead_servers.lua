-- @include as_argument
-- @include dead_servers_limit
-- The servers that are dead, as '<boot epoch>:<server_id>': not seen for longer than the threshold, or replaced by a
-- later start of the same id, which leaves a score of 0; at most dead_servers_limit. Or, with an id, starts of that,
-- at most 100.
local function dead_servers(servers_key, server_id, now_ms, server_threshold_ms)
  if server_id == '' then
    local oldest_alive = '(' .. as_argument(now_ms - server_threshold_ms)
    return redis.call('ZRANGE', servers_key, '0', oldest_alive, 'BYSCORE', 'LIMIT', '0', dead_servers_limit)
  end
  local starts = {}
  for _, server in ipairs(redis.call('ZRANGE', servers_key, '0', '-1')) do
    if #starts < 100 and server:match('^%d+:(.*)$') == server_id then
      starts[#starts + 1] = server
    end
  end
  return starts
end
