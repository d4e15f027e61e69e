-- @include starts_of
-- Tell whether a later start of the same game server is known. server = '<boot epoch>:<server_id>'.
local function is_replaced(servers_key, server)
  local epoch, server_id = server:match('^(%d+):(.*)$')
  for _, start in ipairs(starts_of(servers_key, server_id)) do
    if tonumber(start:match('^%d+')) > tonumber(epoch) then
      return true
    end
  end
  return false
end
