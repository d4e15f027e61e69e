-- The known starts of a game server whose scores are from lowest on, each '<boot epoch>:<server_id>'.
local function starts_of(servers_key, server_id, lowest)
  local starts = {}
  for _, start in ipairs(redis.call('ZRANGE', servers_key, lowest, '+inf', 'BYSCORE')) do
    if start:match('^%d+:(.*)$') == server_id then
      starts[#starts + 1] = start
    end
  end
  return starts
end
