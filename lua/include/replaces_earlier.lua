-- @include starts_of
-- For a start of a game server that becomes known again: if no later one is known, it replaces the earlier ones, which
-- may have come back before it. Give whether it does. server = '<boot epoch>:<server_id>'.
local function replaces_earlier(servers_key, server)
  local epoch, server_id = server:match('^(%d+):(.*)$')
  local earlier = {}
  for _, start in ipairs(starts_of(servers_key, server_id, '0')) do
    local other_epoch = tonumber(start:match('^%d+'))
    if other_epoch > tonumber(epoch) then
      return false
    elseif start ~= server then
      earlier[#earlier + 1] = start
    end
  end
  for _, start in ipairs(earlier) do
    redis.call('ZADD', servers_key, '0', start)
  end
  return true
end
