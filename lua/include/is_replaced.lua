-- Tell whether a later start of the same game server is known. server = '<boot epoch>:<server_id>'.
local function is_replaced(servers_key, server)
  local epoch, server_id = server:match('^(%d+):(.*)$')
  for _, other in ipairs(redis.call('ZRANGE', servers_key, '0', '-1')) do
    local its_epoch, its_id = other:match('^(%d+):(.*)$')
    if its_id == server_id and tonumber(its_epoch) > tonumber(epoch) then
      return true
    end
  end
  return false
end
