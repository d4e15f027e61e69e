-- What a game keeps of a member: '<registered_at us>[:<connected_at ms>] <user_id>'. registered_at, the order of the
-- user's connections, implies connected_at, which stands there only where it differs: the sid was registered again, or
-- the clock ran back.
local function game_entry(registered_at, connected_at, user_id)
  if string.sub(registered_at, 1, -4) == connected_at then
    return registered_at .. ' ' .. user_id
  end
  return registered_at .. ':' .. connected_at .. ' ' .. user_id
end
