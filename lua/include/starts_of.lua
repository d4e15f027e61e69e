-- The known starts of a game server whose scores are from lowest on, each '<boot epoch>:<server_id>'; if a newest_start
-- is given, only those whose boot epoch is at most that.
local function starts_of(servers_key, server_id, lowest, newest_start)
  local starts = {}
  for _, start in ipairs(redis.call('ZRANGE', servers_key, lowest, '+inf', 'BYSCORE')) do
    local epoch, its_id = start:match('^(%d+):(.*)$')
    if its_id == server_id and tonumber(epoch) <= (newest_start or math.huge) then
      starts[#starts + 1] = start
    end
  end
  return starts
end
